"""Plain text for next-token training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lit_ppo.data.encoding import pad_right, padding_id, tokenize
from lit_ppo.data.module import RowDataModule
from lit_ppo.data.table import Table
from lit_ppo.data.tokenization import train_tokenizer_once
from lit_ppo.validate import all_or_none, at_most_one, boolean, integer, refuse


class TextDataModule(RowDataModule):
    """Documents for supervised fine-tuning (SFT) or pretraining.

    Batches are ``input_ids``, ``attention_mask`` and ``labels`` (a copy, -100 where padded; the model shifts them),
    padded on the right to the longest row. A document longer than ``max_length`` is cut into pieces that overlap by
    one token: no text is lost, and every token except the first is predicted exactly once.

    Args:
        path: Training file or hub data set, see :func:`lit_ppo.data.files.read_table`.
        text_column: Column with the text.
        val_path: Validation file.
        val_fraction: Fraction of the training file to hold out instead, see :meth:`lit_ppo.data.table.Table.split`.
        split_column: Column whose value decides which rows are held out; None: the text.
        max_length: Maximum tokens of a piece.
        batch_size: Pieces per batch and rank.
        packing: Join all documents before cutting: no padding, so faster where lengths differ. A piece can then
            contain the end of one document and the start of the next; ``append_eos`` marks the boundary.
        append_eos: Append the end-of-text token to every document, so that the model learns to stop.
        lower_case: Lower-case the text.
        column_names: Columns of a CSV or TSV file without a header.
        tokenizer: Tokenizer, or its path or hub name; None: ``tokenizer_path``, else that of the module being trained.
        tokenizer_path: Folder for a byte-level BPE tokenizer that is trained on the text before the models are built:
            the module being trained can name the same folder. It is trained again only if the text or
            ``tokenizer_vocab_size`` changes.
        tokenizer_vocab_size: Its number of tokens.
        data_root: Folder of relative data paths; None: the working directory.
        seed: Seed of the order; None: that of ``seed_everything``.
    """

    def __init__(
        self,
        path: str,
        *,
        text_column: str = "text",
        val_path: str | None = None,
        val_fraction: float = 0.0,
        split_column: str | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        packing: bool = False,
        append_eos: bool = True,
        lower_case: bool = False,
        column_names: list[str] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        tokenizer_path: str | None = None,
        tokenizer_vocab_size: int | None = None,
        data_root: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            path, val_path, val_fraction, split_column, batch_size, lower_case, column_names, tokenizer, data_root, seed
        )
        self.text_column = text_column
        self.packing, self.append_eos = boolean(self, "packing", packing), boolean(self, "append_eos", append_eos)
        self.max_length = integer(self, "max_length", max_length, at_least=2)
        self.tokenizer_path, self.tokenizer_vocab_size = tokenizer_path, tokenizer_vocab_size
        all_or_none(self, tokenizer_path=tokenizer_path, tokenizer_vocab_size=tokenizer_vocab_size)
        at_most_one(self, tokenizer=tokenizer, tokenizer_path=tokenizer_path)

    def prepare_data(self) -> None:
        """Train the tokenizer on the training text, if there is a ``tokenizer_path``."""
        if self.tokenizer_path is not None and self.tokenizer_vocab_size is not None:
            texts = self._texts(self.read_split([self.text_column])[0])
            train_tokenizer_once(self.where("tokenizer_path"), texts, self.tokenizer_vocab_size, self.tokenizer_path)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.tokenizer_source = self.tokenizer_source or self.tokenizer_path
        tokenizer = self.load_tokenizer()
        self._pad_id = padding_id(type(self).__name__, tokenizer)
        train, val = self.read_split([self.text_column])
        self.train_rows = self._pieces(tokenizer, self._texts(train))
        self.val_rows = self._pieces(tokenizer, self._texts(val)) if val is not None else []

    def _texts(self, table: Table) -> list[str]:
        return [self.cased(table.text(i, self.text_column)) for i in range(len(table))]

    def _pieces(self, tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
        documents = tokenize(tokenizer, texts)
        if self.append_eos:
            eos = tokenizer.eos_token_id
            if eos is None:
                problem = f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token; "
                refuse(self, "append_eos", True, problem + "set tokenizer.eos_token, or append_eos=False")
            documents = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in documents]
        if self.packing:
            documents = [[token for ids in documents for token in ids]]
        pieces = [piece for ids in documents for piece in cut(ids, self.max_length)]
        n_short = sum(len(ids) < 2 for ids in documents)
        if n_short:
            rank_zero_warn(
                f"{self.where('path')}: {n_short} of {len(documents)} documents have fewer than two tokens and are "
                "left out"
            )
        if not pieces:
            raise ValueError(f"{self.where('path')}: no document has two tokens; give longer text")
        return [np.array(piece, dtype=np.int32) for piece in pieces]

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        batch = pad_right(rows, self._pad_id)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def cut(ids: Sequence[int], max_length: int) -> list[Sequence[int]]:
    """Pieces of at most ``max_length`` tokens; each starts with the last token of the previous one.

    >>> cut([1, 2, 3, 4, 5, 6], max_length=3)
    [[1, 2, 3], [3, 4, 5], [5, 6]]
    """
    return [ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1)]
