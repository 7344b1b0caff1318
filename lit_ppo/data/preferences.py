"""Preference pairs and labelled texts for reward models."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lit_ppo.data.encoding import pad_right, padding_id, render_chats, tokenize, truncate_left
from lit_ppo.data.module import RowDataModule
from lit_ppo.data.table import Table
from lit_ppo.validate import all_or_none, integer, refuse


class PreferenceDataModule(RowDataModule):
    """Pairs of a chosen and a rejected text, or texts with a label.

    Batches of pairs (the default) are ``{"chosen": {input_ids, attention_mask}, "rejected": {...}}``; with
    ``text_column`` and ``label_column`` they are ``{input_ids, attention_mask, labels}``, labels float, 0 (bad) to 1
    (good). Rows are padded on the right. Texts longer than ``max_length`` are cut from the left, since the score is
    that of the last token.

    Args:
        path: Training file or hub data set, see :func:`lit_ppo.data.files.read_table`.
        chosen_column: Column with the better text, or its chat messages.
        rejected_column: Column with the worse one.
        prompt_column: Column with the prompt of both, text or chat messages; None: both texts include it. Plain prompt
            and answer are joined without a separator; after a chat prompt, a plain answer becomes the assistant's
            message.
        text_column: Column with a labelled text; with several columns, each is a separate example.
        label_column: Column with the label.
        val_path: Validation file.
        val_fraction: Fraction of the training file to hold out instead, see :meth:`lit_ppo.data.table.Table.split`.
        split_column: Column whose value decides which rows are held out; None: the texts of the row.
        max_length: Longest text, in tokens.
        batch_size: Rows per batch and rank.
        lower_case: Lower-case the text.
        column_names: Columns of a CSV or TSV file without a header.
        tokenizer: Tokenizer, or its path or hub name; None: that of the module being trained.
        data_root: Folder of relative data paths; None: the working directory.
        seed: Seed of the order; None: that of ``seed_everything``.
    """

    def __init__(
        self,
        path: str,
        *,
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        prompt_column: str | None = None,
        text_column: str | list[str] | None = None,
        label_column: str | None = None,
        val_path: str | None = None,
        val_fraction: float = 0.0,
        split_column: str | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        lower_case: bool = False,
        column_names: list[str] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        data_root: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            path, val_path, val_fraction, split_column, batch_size, lower_case, column_names, tokenizer, data_root, seed
        )
        self.chosen_column, self.rejected_column, self.prompt_column = chosen_column, rejected_column, prompt_column
        self.text_column, self.label_column = text_column, label_column
        self.max_length = integer(self, "max_length", max_length, at_least=2)
        all_or_none(self, text_column=text_column, label_column=label_column)
        self.text_columns = [text_column] if isinstance(text_column, str) else list(text_column or [])
        if text_column is not None and not self.text_columns:
            refuse(self, "text_column", text_column, "names no column; name at least one")
        for argument, default in (
            ("chosen_column", "chosen"),
            ("rejected_column", "rejected"),
            ("prompt_column", None),
        ):
            if self.text_columns and getattr(self, argument) != default:
                problem = "text_column is given, so no pairs are read; leave one of them out"
                refuse(self, argument, getattr(self, argument), problem)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._tokenizer = self.load_tokenizer()
        self._pad_id = padding_id(type(self).__name__, self._tokenizer)
        columns = self.text_columns or [self.chosen_column, self.rejected_column]
        train, val = self.read_split([*([self.prompt_column] if self.prompt_column else []), *columns])
        self.train_rows = self._rows(train)
        self.val_rows = self._rows(val) if val is not None else []

    def _rows(self, table: Table) -> list[Any]:
        indices = range(len(table))
        if self.label_column is not None:
            label_column = self.label_column
            texts = [self.cased(table.text(i, column)) for i in indices for column in self.text_columns]
            labels = [_label(table, i, label_column) for i in indices for _ in self.text_columns]
            return list(zip(self._encode(table.where, texts, chats=False), labels, strict=True))
        answers = [
            self._answer(table, i, column) for column in (self.chosen_column, self.rejected_column) for i in indices
        ]
        chats = [not isinstance(answer, str) for answer in answers]
        if any(chats) != all(chats):
            table.refuse(chats.index(not chats[0]) % len(table), "chat messages and plain text are mixed; use one kind")
        ids = self._encode(table.where, answers, chats=chats[0])
        return list(zip(ids[: len(table)], ids[len(table) :], strict=True))

    def _answer(self, table: Table, index: int, column: str) -> Any:
        """One side of a pair with its prompt: text, or a list of messages."""
        answer = self.text_or_chat(table, index, column)
        if self.prompt_column is None:
            return answer
        prompt = self.text_or_chat(table, index, self.prompt_column)
        if isinstance(prompt, str) and isinstance(answer, str):
            return prompt + answer
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return prompt + ([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)

    def _encode(self, where: str, texts: list[Any], chats: bool) -> list[list[int]]:
        tokenizer = self._tokenizer
        if chats:
            texts = render_chats(tokenizer, texts, where, add_generation_prompt=False)
        ids = tokenize(tokenizer, texts, add_special_tokens=not chats)
        return truncate_left(ids, self.max_length, tokenizer.bos_token_id, self.where("max_length"), "texts")

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        left, right = ([row[side] for row in rows] for side in (0, 1))
        if self.label_column is not None:
            return {**pad_right(left, self._pad_id), "labels": torch.tensor(right, dtype=torch.float32)}
        return {"chosen": pad_right(left, self._pad_id), "rejected": pad_right(right, self._pad_id)}


def _label(table: Table, index: int, column: str) -> float:
    value = table.cell(index, column)
    try:
        label = float(value)
    except (TypeError, ValueError):
        label = float("nan")
    if not 0.0 <= label <= 1.0:
        table.refuse(index, f"label {value!r} in column {column!r}; give 0 (bad) to 1 (good)")
    return label
