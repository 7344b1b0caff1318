"""Preference pairs and labelled texts for reward models."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lit_ppo.constructor import constructor
from lit_ppo.data.chat import conversation, render_chats
from lit_ppo.data.encoding import pad_right, padding_id, tokenize, truncate_left
from lit_ppo.data.module import RowDataModule
from lit_ppo.data.objects import Data
from lit_ppo.data.table import ROW_MB, Table
from lit_ppo.validate import all_or_none, checked_names, integer, refuse, text, text_or_none

PROMPT = "prompt"
"""Column of the prompt where no other is named."""


class PreferenceDataModule(RowDataModule):
    """Pairs of a chosen and a rejected text, or texts with a label.

    Batches of pairs (the default) are ``{"chosen": {input_ids, attention_mask}, "rejected": {...}}``; with
    ``text_column`` and ``label_column`` they are ``{input_ids, attention_mask, labels}``, labels float, 0 (bad) to 1
    (good). Rows are padded on the right. Texts longer than ``max_length`` are cut from the left, since the score is
    that of the last token.

    Args:
        path: Training file or hub data set, see :func:`lit_ppo.data.files.read_table`; or the rows themselves: a
            ``datasets.Dataset``, a list of rows, a mapping of columns, a ``DataFrame``, a stream.
        chosen_column: Column with the better text, or its chat messages.
        rejected_column: Column with the worse one.
        prompt_column: Column with the prompt of both, text or chat messages; None: ``prompt`` if the data have this
            column, else both texts include it. Plain prompt and answer are joined without a separator; after a chat
            prompt, a plain answer becomes the assistant's message. Answers that repeat the prompt (a conversation that
            begins with its turns, or plain answers that all begin with it) are taken as they are.
        text_column: Column with a labelled text; with several columns, each is a separate example.
        label_column: Column with the label.
        val_path: Validation file or rows.
        val_fraction: Fraction of the training file to hold out instead, see :meth:`lit_ppo.data.table.Table.split`.
        split_column: Column whose value decides which rows are held out; None: the texts of the row.
        max_length: Longest text, in tokens.
        batch_size: Rows per batch and rank.
        lower_case: Lower-case the text.
        column_names: Columns of a CSV or TSV file without a header.
        tokenizer: Tokenizer, or its path or hub name; None: that of the module being trained.
        data_root: Folder of relative data paths; None: the working directory.
        seed: Seed of the order; None: that of ``seed_everything``.
        max_rows: Read at most this many rows of each file or data set; required for a stream, which has no length.
        chat_template_kwargs: Variables of the chat template, such as ``{enable_thinking: false}``.
        max_row_mb: A longer row, in MiB, is refused, and so is a file or data set whose rows take more than 256 times
            as much (4 GiB): unpacked, with 512 bytes for each row.
    """

    @constructor
    def __init__(
        self,
        path: Data,
        *,
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        prompt_column: str | None = None,
        text_column: str | list[str] | None = None,
        label_column: str | None = None,
        val_path: Data | None = None,
        val_fraction: float = 0.0,
        split_column: str | None = None,
        max_length: int = 512,
        batch_size: int = 8,
        lower_case: bool = False,
        column_names: list[str] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        data_root: str | None = None,
        seed: int | None = None,
        max_rows: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_row_mb: float = ROW_MB,
    ) -> None:
        super().__init__(
            path, val_path, val_fraction, split_column, batch_size, lower_case, column_names, tokenizer, data_root,
            seed, max_rows, chat_template_kwargs, max_row_mb,
        )  # fmt: skip
        self.chosen_column = text(self, "chosen_column", chosen_column)
        self.rejected_column = text(self, "rejected_column", rejected_column)
        self.prompt_column = text_or_none(self, "prompt_column", prompt_column)
        self.text_column, self.label_column = text_column, text_or_none(self, "label_column", label_column)
        self.max_length = integer(self, "max_length", max_length, at_least=2)
        all_or_none(self, text_column=text_column, label_column=label_column)
        columns = [text_column] if isinstance(text_column, str) else text_column
        self.text_columns = [] if columns is None else checked_names(self, "text_column", columns)
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
        answers = self.text_columns or [self.chosen_column, self.rejected_column]
        train, val = self.read_split(lambda table: [*self._prompt_columns(table), *answers])
        prompts = self._prompt_columns(train, *([] if val is None else [val]))
        self.train_rows = self._rows(train, prompts)
        self.val_rows = self._rows(val, prompts) if val is not None else []
        if self.text_columns and len(train) > 1 and len(labels := {label for _, label in self.train_rows}) == 1:
            rank_zero_warn(f"{train.where}: all labels are {labels.pop():g}, so there is nothing to tell apart")

    def _prompt_columns(self, *tables: Table) -> list[str]:
        """The column of the prompt, which is not part of the answers; none if the texts include it."""
        if self.prompt_column is not None:
            return [self.prompt_column]
        taken = self.text_columns or PROMPT in (self.chosen_column, self.rejected_column)
        return [PROMPT] if not taken and any(PROMPT in table.columns for table in tables) else []

    def _rows(self, table: Table, prompt_columns: list[str]) -> list[Any]:
        indices = range(len(table))
        if self.label_column is not None:
            label_column = self.label_column
            texts = [self.cased(table.text(i, column)) for i in indices for column in self.text_columns]
            labels = [_label(table, i, label_column) for i in indices for _ in self.text_columns]
            self._warn_of_prompts(table, texts)
            return list(zip(self._encode(table, texts, chats=False), labels, strict=True))
        columns = (self.chosen_column, self.rejected_column)
        answers = [self.text_or_chat(table, i, column) for column in columns for i in indices]
        for prompt_column in prompt_columns:
            prompts = [self.text_or_chat(table, i, prompt_column) for i in indices] * 2
            if not _are_full_texts(table, prompts, answers):
                if self.prompt_column is None:
                    _check_answers_alone(table, prompts, answers)
                both = enumerate(zip(prompts, answers, strict=True))
                answers = [conversation(table, i % len(table), prompt, answer)[0] for i, (prompt, answer) in both]
        chats = [not isinstance(answer, str) for answer in answers]
        if any(chats) != all(chats):
            table.refuse(chats.index(not chats[0]) % len(table), "chat messages and plain text are mixed; use one kind")
        ids = self._encode(table, answers, chats=chats[0])
        pairs = list(zip(ids[: len(table)], ids[len(table) :], strict=True))
        if n_equal := sum(chosen == rejected for chosen, rejected in pairs):
            rank_zero_warn(
                f"{table.where}: in {n_equal} of {len(pairs)} pairs chosen and rejected have the same tokens (cut to "
                f"max_length={self.max_length}), so they teach nothing; check the columns, or raise max_length"
            )
        return pairs

    def _warn_of_prompts(self, table: Table, texts: list[str]) -> None:
        """Warn of a column of prompts that labelled texts do not include."""
        if PROMPT in table.columns and PROMPT not in self.text_columns:
            prompts = [self.cased(str(row.get(PROMPT) or "")) for row in table.rows for _ in self.text_columns]
            if any(prompt not in text for prompt, text in zip(prompts, texts, strict=True)):
                rank_zero_warn(
                    f"{table.where}: the column {PROMPT!r} is left out, since a labelled text must include its prompt; "
                    "put it into the text, or rename the column if it is no part of the text"
                )

    def _encode(self, table: Table, texts: list[Any], chats: bool) -> list[list[int]]:
        tokenizer = self._tokenizer
        if chats:
            texts = render_chats(
                tokenizer, texts, table.where, options=self.template_options(table),
                place=lambda i: table.place(i % len(table)), end="closed",
            )  # fmt: skip
        ids = tokenize(tokenizer, texts, add_special_tokens=not chats)
        return truncate_left(ids, self.max_length, tokenizer.bos_token_id, self.where("max_length"), "texts")

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        left, right = ([row[side] for row in rows] for side in (0, 1))
        if self.label_column is not None:
            return {**pad_right(left, self._pad_id), "labels": torch.tensor(right, dtype=torch.float32)}
        return {"chosen": pad_right(left, self._pad_id), "rejected": pad_right(right, self._pad_id)}


def _are_full_texts(table: Table, prompts: list[Any], answers: list[Any]) -> bool:
    """Whether all plain answers begin with their prompts, so that these need not be put in front.

    Raises:
        ValueError: Most do, but not all.
    """
    pairs = [pair for pair in enumerate(zip(prompts, answers, strict=True)) if all(isinstance(x, str) for x in pair[1])]
    others = [i for i, (prompt, answer) in pairs if not answer.startswith(prompt)]
    if others and len(others) < len(pairs) / 2:
        problem = f"the answer does not begin with the prompt, but {len(pairs) - len(others)} of {len(pairs)} do; "
        table.refuse(others[0] % len(table), problem + "give answers alone, or full texts without prompt_column")
    return len(pairs) == len(answers) and not others


def _check_answers_alone(table: Table, prompts: list[Any], answers: list[Any]) -> None:
    """Check that plain answers do not hold their prompts somewhere inside.

    Raises:
        ValueError: Most do.
    """
    pairs = [(x, y) for x, y in zip(prompts, answers, strict=True) if isinstance(x, str) and isinstance(y, str)]
    n_full = sum(prompt.strip() in answer for prompt, answer in pairs)
    if n_full > len(pairs) / 2:
        raise ValueError(
            f"{table.where}: {n_full} of {len(pairs)} texts hold the prompt, but not all begin with it; rename the "
            f"column {PROMPT!r} if the texts are complete, or give prompt_column={PROMPT!r} to put it before them"
        )


def _label(table: Table, index: int, column: str) -> float:
    value = table.cell(index, column)
    try:
        label = float(value)
    except (OverflowError, TypeError, ValueError):
        label = float("nan")
    if not 0.0 <= label <= 1.0:
        table.refuse(index, f"label {value!r:.80} in column {column!r}; give 0 (bad) to 1 (good)")
    return label
