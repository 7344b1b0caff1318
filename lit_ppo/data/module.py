"""The base of the three data modules: files or rows, split, tokenizer, seed."""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from os import PathLike
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lit_ppo.data.batch import EpochSampler, HeldOutRows, RowLoader
from lit_ppo.data.chat import checked_options
from lit_ppo.data.encoding import checked_tokenizer, resolve_tokenizer
from lit_ppo.data.files import read_table
from lit_ppo.data.objects import Data, checked_data, has_splits, shown
from lit_ppo.data.table import Table
from lit_ppo.data.tokenization import gives_the_same_ids
from lit_ppo.validate import (
    boolean,
    checked_names,
    integer,
    integer_or_none,
    number,
    path_or_none,
    refuse,
    seed_number,
    text_or_none,
)


class TableDataModule(L.LightningDataModule):
    """Reads training and validation rows; subclasses make batches."""

    column_of_text: str | None = None  # argument with the column of rows that are just text

    def __init__(
        self,
        path: Data,
        val_path: Data | None,
        val_fraction: float,
        split_column: str | None,
        batch_size: int,
        lower_case: bool,
        column_names: list[str] | None,
        tokenizer: str | PreTrainedTokenizerBase | None,
        data_root: str | None,
        seed: int | None,
        max_rows: int | None,
        chat_template_kwargs: dict[str, Any] | None,
        max_row_mb: float,
    ) -> None:
        super().__init__()
        self.path = checked_data(self, "path", path)
        self.val_path = None if val_path is None else checked_data(self, "val_path", val_path)
        self.column_names = None if column_names is None else checked_names(self, "column_names", column_names)
        self.data_root = path_or_none(self, "data_root", data_root)
        self.max_rows = integer_or_none(self, "max_rows", max_rows)
        self.max_row_mb = number(self, "max_row_mb", max_row_mb, above=0, below=2**20)
        self._template_options = None if chat_template_kwargs is None else checked_options(self, chat_template_kwargs)
        self._in_memory: dict[str, Table] = {}  # some rows can be read only once
        self.val_fraction = number(self, "val_fraction", val_fraction, at_least=0, below=1)
        self.split_column = text_or_none(self, "split_column", split_column)
        self.lower_case = boolean(self, "lower_case", lower_case)
        self.batch_size = integer(self, "batch_size", batch_size)
        self.tokenizer_source = checked_tokenizer(self, tokenizer)
        self._seed = None if seed is None else seed_number(self, "seed", seed)
        if val_path is not None and self.val_fraction:
            problem = f"val_fraction={val_fraction} is given too; leave one of them out"
            raise ValueError(f"{self.where('val_path')}: {problem}")
        if split_column is not None and not self.val_fraction:
            refuse(self, "split_column", split_column, "nothing is split; give a val_fraction, or leave it out")

    def where(self, argument: str) -> str:
        """An argument and its value, for messages."""
        return f"{type(self).__name__}({argument}={shown(getattr(self, argument))})"

    @property
    def seed(self) -> int:
        """The seed of the order: the argument, or that of ``seed_everything``."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self._seed is None else self._seed

    def template_options(self, table: Table) -> dict[str, Any]:
        """Variables of the chat template: the argument, or those of the module being trained."""
        for column in {"chat_template_kwargs", "tools"} & set(table.columns):
            rank_zero_warn(
                f"{table.where}: the chat template does not get the column {column!r}; give all rows the same, by "
                f"{type(self).__name__}(chat_template_kwargs=...)"
            )
        if self._template_options is not None:
            return self._template_options
        return getattr(getattr(self.trainer, "lightning_module", None), "chat_template_kwargs", None) or {}

    def read(self, argument: str) -> Table:
        """The table of the file, or of the rows, that an argument gives."""
        data = getattr(self, argument)
        if argument in self._in_memory:
            return self._in_memory[argument]
        if argument != "path" and has_splits(data):  # whose default is the split to train on
            raise ValueError(f"{self.where(argument)}: it has the splits {', '.join(data)}; give the data set of one")
        column = getattr(self, self.column_of_text) if self.column_of_text else None
        table = read_table(
            self.where(argument), data, self.data_root, self.column_names, column=column, max_rows=self.max_rows,
            max_row_mb=self.max_row_mb,
        )  # fmt: skip
        if not isinstance(data, str | PathLike):
            self._in_memory[argument] = table
        return table

    def read_split(self, text_columns: Callable[[Table], Sequence[str]]) -> tuple[Table, Table | None]:
        """Training rows, and validation rows if there are any.

        Args:
            text_columns: From the table to the columns that decide the side of a row if there is no ``split_column``:
                copies stay together.
        """
        table = self.read("path")
        if self.val_path is not None:
            return table, self.read("val_path")
        if not self.val_fraction:
            return table, None
        columns = [self.split_column] if self.split_column is not None else text_columns(table)
        return table.split(self.val_fraction, columns)

    def cased(self, text: str) -> str:
        """The text, in lower case with ``lower_case``."""
        return text.lower() if self.lower_case else text

    def text_or_chat(self, table: Table, index: int, column: str) -> Any:
        """A row's text, or its list of chat messages."""
        if table.is_chat(index, column):
            return [{**turn, "content": self.cased(turn["content"])} for turn in table.chat(index, column)]
        return self.cased(table.text(index, column))

    def load_tokenizer(self) -> Any:
        """The tokenizer of the argument, or of the module being trained.

        Raises:
            ValueError: There is none, or that of the argument gives other ids than that of the module.
        """
        tokenizer = resolve_tokenizer(type(self).__name__, self.tokenizer_source, self.trainer)
        module = getattr(self.trainer, "lightning_module", None)
        own = getattr(module, "tokenizer", None)
        if isinstance(own, PreTrainedTokenizerBase) and not gives_the_same_ids(tokenizer, own):
            argument = "tokenizer_path" if getattr(self, "tokenizer_path", None) else "tokenizer"
            raise ValueError(
                f"{type(self).__name__}({argument}={shown(self.tokenizer_source)}): gives other ids than the tokenizer "
                f"of {type(module).__name__} ({own.name_or_path!r}), which the model reads; leave it out, or give both "
                "the same"
            )
        return tokenizer

    def setup(self, stage: str) -> None:
        """Silence three warnings of Lightning.

        Two are about worker processes, which prepared rows do not need; one is about validation without data, which
        ``fit`` allows.
        """
        for message in (
            ".*does not have many workers which may be a bottleneck",
            "Your `IterableDataset` has `__len__` defined",
            "Total length of `list` across ranks is zero",
        ):
            warnings.filterwarnings("ignore", message=message)


class RowDataModule(TableDataModule):
    """The base of data modules whose rows Lightning distributes to ranks; the order comes from the seed.

    ``batch_size`` is the number of rows per rank, as usual in Lightning.
    """

    train_rows: list[Any]
    val_rows: list[Any]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.__dict__.pop("_fingerprints", None)

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        """Make a batch."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The identity of the data, which the position of the loader depends on."""
        batch_size = self.batch_size * self._n_ranks
        identity = {"rows": len(self.train_rows), "batch_size": batch_size, "seed": self.seed}
        return {**identity, "fingerprint": self._fingerprints[0], "validation": self._fingerprints[1]}

    @property
    def _n_ranks(self) -> int:
        """Ranks that share the rows; data of a callback (PTXLoss) are not dealt out."""
        dealt = self.trainer if getattr(self.trainer, "datamodule", None) is self else None
        return dealt.world_size if dealt else 1

    @cached_property
    def _fingerprints(self) -> list[str]:
        """Of the training and the validation rows."""
        digests = hashlib.sha256(), hashlib.sha256()
        for digest, rows in zip(digests, (self.train_rows, self.val_rows), strict=True):
            for row in rows:
                digest.update(_as_bytes(row))
        return [digest.hexdigest() for digest in digests]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the data with those of the checkpoint.

        Raises:
            ValueError: Data, seed or the batch of all ranks differ.
        """
        if self.trainer is not None and self.trainer.state.fn == "fit":
            check_identity(self, state_dict, self.state_dict(), "rows")

    def train_dataloader(self) -> DataLoader[Any]:
        """Training rows, shuffled in every epoch; a run can resume in the middle of one."""
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        rows: Any = self.train_rows
        sampler = EpochSampler(rows, num_replicas=world_size, rank=rank, seed=self.seed)
        return RowLoader(rows, self.trainer, batch_size=self.batch_size, sampler=sampler, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Validation rows in the order of the file.

        Where ranks cannot have equally many, some get a row again: their batches have ``weight``, which is 0 for it.
        """
        if not self.val_rows:
            return []
        rows = HeldOutRows(self.val_rows, self._n_ranks)
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=self._collate_weighted)

    def _collate_weighted(self, rows: list[tuple[Any, int]]) -> dict[str, Any]:
        batch, weights = self.collate([row for row, _ in rows]), [weight for _, weight in rows]
        return batch if all(weights) else {**batch, "weight": torch.tensor(weights)}


def check_identity(data: TableDataModule, saved: dict[str, Any], now: dict[str, Any], what: str) -> None:
    """Refuse to resume with other data than the checkpoint's.

    Args:
        data: For messages.
        saved: Identity of the data in the checkpoint.
        now: Identity of the current data.
        what: ``"prompts"`` or ``"rows"``, for messages.

    Raises:
        ValueError: They differ.
    """
    for name, value in now.items():
        if name not in saved:
            problem = f"cannot resume from the checkpoint: its state of the data lacks {name}"
            raise ValueError(f"{data.where('path')}: {problem}; give another checkpoint, or start a new run")
        if saved[name] != value:
            reason = f"{name} was {saved[name]} when it was written, now it is {value}; restore it"
            if name in ("fingerprint", "validation"):
                kind = "training" if name == "fingerprint" else name
                reason = f"the {kind} {what} differ from those that it was written with; restore them"
            argument = name if name in ("seed", "batch_size") else "path"
            if name == "validation" and not data.val_fraction:
                argument = "val_path"
            raise ValueError(
                f"{data.where(argument)}: cannot resume from the checkpoint: {reason}, or start a new run from the "
                "exported model"
            )


def _as_bytes(row: Any) -> bytes:
    if isinstance(row, np.ndarray):
        return row.tobytes() + b"|"
    if isinstance(row, dict):
        return b"".join(str(key).encode() + _as_bytes(value) for key, value in row.items())
    if isinstance(row, list | tuple):
        return b"".join(map(_as_bytes, row)) + b"|"
    return repr(row).encode() + b"|"
