"""Text for next-token training: documents, conversations, prompts with completions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lit_ppo.constructor import constructor
from lit_ppo.data.chat import Span, assistant_spans, check_template, conversation, each_chat, render
from lit_ppo.data.encoding import pad_right, padding_id, tokenize, tokens_in_spans
from lit_ppo.data.module import RowDataModule
from lit_ppo.data.objects import Data
from lit_ppo.data.table import ROW_MB, Table
from lit_ppo.data.tokenization import MIN_VOCAB_SIZE, train_tokenizer_once
from lit_ppo.validate import (
    all_or_none,
    at_most_one,
    boolean,
    integer,
    integer_or_none,
    path_or_none,
    refuse,
    text,
    text_or_none,
)

IGNORED = -100
"""Label of a token without loss."""


class TextDataModule(RowDataModule):
    """Text for supervised fine-tuning (SFT) or pretraining: documents, chats, or prompts with their completions.

    Batches are ``input_ids``, ``attention_mask`` and ``labels`` (a copy; -100 where padded and where there is no loss;
    the model shifts them), padded on the right to the longest row.

    A document longer than ``max_length`` is cut into pieces that overlap by one token: no text is lost, and every token
    except the first is predicted exactly once. Chat messages are rendered by the tokenizer's template, with the loss on
    the turns of the assistant. With a prompt and a completion, each text or messages, the loss is on the completion.
    Chats and completions that are longer than ``max_length`` lose their end.

    Args:
        path: Training file or hub data set, see :func:`lit_ppo.data.files.read_table`; or the rows themselves: a
            ``datasets.Dataset``, a list of rows or of texts, a mapping of columns, a ``DataFrame``, a stream.
        text_column: Column with a document or a list of chat messages. Data without this column are read from
            ``messages``, or from ``prompt`` and ``completion``.
        val_path: Validation file or rows.
        val_fraction: Fraction of the training file to hold out instead, see :meth:`lit_ppo.data.table.Table.split`.
        split_column: Column whose value decides which rows are held out; None: the text.
        max_length: Maximum tokens of a piece.
        batch_size: Pieces per batch and rank.
        packing: Join all rows before cutting: no padding, so faster where lengths differ. A piece can then contain the
            end of one row and the start of the next; ``append_eos`` marks the boundary.
        append_eos: Append the end-of-text token to every document and completion, so that the model learns to stop; to
            a chat only if its template does not end with a special token.
        lower_case: Lower-case the text.
        column_names: Columns of a CSV or TSV file without a header.
        tokenizer: Tokenizer, or its path or hub name; None: ``tokenizer_path``, else that of the module being trained.
        tokenizer_path: Folder for a byte-level BPE tokenizer that is trained on the text before the models are built:
            the module being trained can name the same folder. It is trained again only if the text or
            ``tokenizer_vocab_size`` changes.
        tokenizer_vocab_size: Its number of tokens.
        data_root: Folder of relative data paths; None: the working directory.
        seed: Seed of the order; None: that of ``seed_everything``.
        max_rows: Read at most this many rows of each file or data set; required for a stream, which has no length.
        chat_template_kwargs: Variables of the chat template, such as ``{enable_thinking: false}``.
        max_row_mb: A longer row, in MiB, is refused, and so is a file or data set whose rows take more than 256 times
            as much (4 GiB): unpacked, with 512 bytes for each row.
        prompt_column: Column with the prompt of ``completion_column``.
        completion_column: Column with the completion, where the data have other columns of text, too.
        train_on_prompts: The loss is also on prompts and on all turns of a chat.
    """

    column_of_text = "text_column"

    @constructor
    def __init__(
        self,
        path: Data,
        *,
        text_column: str = "text",
        val_path: Data | None = None,
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
        max_rows: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        prompt_column: str = "prompt",
        completion_column: str | None = None,
        train_on_prompts: bool = False,
        max_row_mb: float = ROW_MB,
    ) -> None:
        super().__init__(
            path, val_path, val_fraction, split_column, batch_size, lower_case, column_names, tokenizer, data_root,
            seed, max_rows, chat_template_kwargs, max_row_mb,
        )  # fmt: skip
        self.text_column, self.prompt_column = text(self, "text_column", text_column), prompt_column
        text(self, "prompt_column", prompt_column)
        self.completion_column = text_or_none(self, "completion_column", completion_column)
        self.packing, self.append_eos = boolean(self, "packing", packing), boolean(self, "append_eos", append_eos)
        self.train_on_prompts = boolean(self, "train_on_prompts", train_on_prompts)
        self.max_length = integer(self, "max_length", max_length, at_least=2)
        self.tokenizer_path = path_or_none(self, "tokenizer_path", tokenizer_path)
        self.tokenizer_vocab_size = integer_or_none(
            self, "tokenizer_vocab_size", tokenizer_vocab_size, at_least=MIN_VOCAB_SIZE
        )
        all_or_none(self, tokenizer_path=tokenizer_path, tokenizer_vocab_size=tokenizer_vocab_size)
        at_most_one(self, tokenizer=tokenizer, tokenizer_path=tokenizer_path)

    def prepare_data(self) -> None:
        """Train the tokenizer on the training text, if there is a ``tokenizer_path``."""
        if self.tokenizer_path is not None and self.tokenizer_vocab_size is not None:
            rows = self._rows(self.read_split(self._columns)[0])
            if not all(isinstance(row, str) for row, _ in rows):
                problem = "a tokenizer that is trained here has no chat template; give the tokenizer of a chat model"
                refuse(self, "tokenizer_path", self.tokenizer_path, problem)
            texts = [row for row, _ in rows]
            train_tokenizer_once(self.where("tokenizer_path"), texts, self.tokenizer_vocab_size, self.tokenizer_path)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.tokenizer_source = self.tokenizer_source or self.tokenizer_path
        tokenizer = self.load_tokenizer()
        self._pad_id = padding_id(type(self).__name__, tokenizer)
        train, val = self.read_split(self._columns)
        self.train_rows = self._pieces(tokenizer, train)
        self.val_rows = self._pieces(tokenizer, val) if val is not None else []

    def _columns(self, table: Table) -> list[str]:
        """The columns that are trained on."""
        if self.completion_column is not None:
            return [self.prompt_column, self.completion_column]
        for columns in ([self.text_column], ["messages"], [self.prompt_column, "completion"]):
            if set(columns) <= set(table.columns):
                return columns
        return [self.text_column]

    def _rows(self, table: Table) -> list[tuple[Any, Any]]:
        """Text or messages of each row, and the part at their start that is a prompt; None for a document."""
        columns = self._columns(table)
        parts = [[self.text_or_chat(table, i, column) for column in columns] for i in range(len(table))]
        rows = [(part[0], None) if len(part) == 1 else conversation(table, i, *part) for i, part in enumerate(parts)]
        for i, (row, _) in enumerate(rows):
            if isinstance(row, str) != isinstance(rows[0][0], str):
                table.refuse(i, "chat messages and plain text are mixed; use one kind")
        return rows

    def _pieces(self, tokenizer: Any, table: Table) -> list[np.ndarray]:
        """Token ids of each piece of a document; of conversations, ids and labels, (2, L)."""
        rows = self._rows(table)
        text, prompt = rows[0]
        if prompt is None and isinstance(text, str):
            return self._documents(tokenizer, table, [text for text, _ in rows])
        return self._conversations(tokenizer, table, rows)

    def _documents(self, tokenizer: Any, table: Table, texts: list[str]) -> list[np.ndarray]:
        documents = tokenize(tokenizer, texts)
        if self.append_eos:
            eos = self._eos(tokenizer)
            documents = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in documents]
        if self.packing:
            documents = [[token for ids in documents for token in ids]]
        pieces = [piece for ids in documents for piece in cut(ids, self.max_length)]
        n_short = sum(len(ids) < 2 for ids in documents)
        if n_short:
            rank_zero_warn(
                f"{table.where}: {n_short} of {len(documents)} documents have fewer than two tokens and are left out"
            )
        if not pieces:
            raise ValueError(f"{table.where}: no document has two tokens; give longer text")
        return [np.array(piece, dtype=np.int32) for piece in pieces]

    def _conversations(self, tokenizer: Any, table: Table, rows: list[tuple[Any, Any]]) -> list[np.ndarray]:
        chats, special = not isinstance(rows[0][0], str), special_tokens(tokenizer)
        texts, spans = self._texts_and_spans(tokenizer, table, rows)
        all_ids, masks = tokens_in_spans(tokenizer, texts, spans, add_special_tokens=not chats, refuse=table.refuse)
        pairs, ends = [], False
        for ids, mask in zip(all_ids, masks, strict=True):
            closed = chats and _last_visible(tokenizer, ids) in special
            if self.append_eos and mask[-1] and not closed and ids[-1] != self._eos(tokenizer):
                ids, mask = [*ids, self._eos(tokenizer)], [*mask, True]
            pairs.append(np.array([ids, np.where(mask, ids, IGNORED)], dtype=np.int32))
            ends = ends or not special.isdisjoint(pairs[-1][1].tolist())
        if chats and not ends:
            rank_zero_warn(
                f"{table.where}: no end token is among the tokens with a loss, so the model will not learn to stop; "
                "let the template write it inside {% generation %}"
            )
        if self.packing:
            joined = np.concatenate(pairs, axis=1)
            pieces = [joined[:, list(piece)] for piece in cut(range(joined.shape[1]), self.max_length)]
        else:
            pieces = [pair[:, : self.max_length] for pair in pairs]
            if n_long := sum(pair.shape[1] > self.max_length for pair in pairs):
                rank_zero_warn(
                    f"{self.where('max_length')}: {n_long} of {len(pairs)} rows are longer and lost their end; the "
                    f"longest has {max(pair.shape[1] for pair in pairs)} tokens"
                )
        kept = [piece for piece in pieces if (piece[1, 1:] != IGNORED).any()]
        if len(kept) < len(pieces) and not self.packing:
            problem = f"rows have no token with a loss among their first {self.max_length} and are left out"
            rank_zero_warn(f"{table.where}: {len(pieces) - len(kept)} of {len(pieces)} {problem}")
        if not kept:
            raise ValueError(f"{self.where('max_length')}: no row has a loss in its first tokens; raise it")
        return kept

    def _texts_and_spans(
        self, tokenizer: Any, table: Table, rows: list[tuple[Any, Any]]
    ) -> tuple[list[str], list[list[Span]]]:
        """The text of each chat or pair, and which parts of it have a loss."""
        if isinstance(rows[0][0], str):
            return [text for text, _ in rows], [[(0 if self.train_on_prompts else len(p), len(t))] for t, p in rows]
        options = self.template_options(table)
        check_template(tokenizer, table.where, options)

        def where(i: int) -> str:
            return f"{table.where}: {table.place(i)}"

        def one(i: int) -> tuple[str, list[Span]]:
            chat, prompt = rows[i]
            if not self.train_on_prompts:
                return assistant_spans(tokenizer, chat, prompt or [], where(i), options)
            text = render(tokenizer, chat, where(i), options, "closed")
            return text, [(0, len(text))]

        done = each_chat(one, [chat for chat, _ in rows], where)
        return [text for text, _ in done], [spans for _, spans in done]

    def _eos(self, tokenizer: Any) -> int:
        if tokenizer.eos_token_id is None:
            problem = f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token; "
            refuse(self, "append_eos", True, problem + "set tokenizer.eos_token, or append_eos=False")
        return int(tokenizer.eos_token_id)

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        batch = pad_right([row if row.ndim == 1 else row[0] for row in rows], self._pad_id)
        if rows[0].ndim == 1:
            return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}
        return {**batch, "labels": pad_right([row[1] for row in rows], IGNORED)["input_ids"]}


def special_tokens(tokenizer: Any) -> set[int]:
    """All tokens that may end a turn: special ones, and those that were added to the vocabulary."""
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return added - {tokenizer.unk_token_id, tokenizer.bos_token_id}


def _last_visible(tokenizer: Any, ids: list[int]) -> int | None:
    """The last token that is not white space."""
    return next((token for token in reversed(ids) if tokenizer.decode([token]).strip()), None)


def cut(ids: Sequence[int], max_length: int) -> list[Sequence[int]]:
    """Pieces of at most ``max_length`` tokens; each starts with the last token of the previous one.

    >>> cut([1, 2, 3, 4, 5, 6], max_length=3)
    [[1, 2, 3], [3, 4, 5], [5, 6]]
    """
    return [ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1)]
