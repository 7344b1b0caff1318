"""What the three data modules share: their files, the split, the tokenizer, the seed."""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lit_ppo.data.encoding import resolve_tokenizer
from lit_ppo.data.files import Table, read_table
from lit_ppo.data.order import EpochSampler, ResumableLoader
from lit_ppo.data.tables import split_table


class TableDataModule(L.LightningDataModule):
    """Reads training and validation rows; subclasses make batches of them."""

    def __init__(
        self,
        path: str,
        val_path: str | None,
        val_fraction: float,
        split_column: str | None,
        batch_size: int,
        lower_case: bool,
        column_names: list[str] | None,
        tokenizer: str | PreTrainedTokenizerBase | None,
        data_root: str | None,
        seed: int | None,
    ) -> None:
        super().__init__()
        self.path, self.val_path, self.column_names, self.data_root = str(path), val_path, column_names, data_root
        self.val_fraction, self.split_column, self.lower_case = val_fraction, split_column, lower_case
        self.batch_size = self._at_least("batch_size", batch_size, 1)
        self.tokenizer_source, self._seed = tokenizer, seed
        if not 0.0 <= val_fraction < 1.0:
            raise ValueError(f"{self.where('val_fraction')}: not in [0, 1); give the share of rows to hold out")
        if val_path is not None and val_fraction:
            raise ValueError(
                f"{self.where('val_path')}: val_fraction={val_fraction} asks for another one; leave one of them out"
            )
        if split_column is not None and not val_fraction:
            raise ValueError(f"{self.where('split_column')}: nothing is split; give a val_fraction, or leave it out")
        if seed is not None:
            self._at_least("_seed", seed, 0)

    def where(self, argument: str) -> str:
        """An argument and its value, as messages name them."""
        return f"{type(self).__name__}({argument.lstrip('_')}={getattr(self, argument)!r})"

    def _at_least(self, argument: str, value: int, minimum: int) -> int:
        if value < minimum:
            name = argument.lstrip("_")
            raise ValueError(f"{type(self).__name__}({name}={value!r}): too small; give at least {minimum}")
        return value

    @property
    def seed(self) -> int:
        """The seed of the order: the one given, else the one of ``seed_everything``."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self._seed is None else self._seed

    def read(self, argument: str) -> Table:
        """The table that an argument names."""
        return read_table(self.where(argument), getattr(self, argument), self.data_root, self.column_names)

    def read_split(self, text_columns: Sequence[str]) -> tuple[Table, Table | None]:
        """Training rows, and validation rows if any were asked for.

        Args:
            text_columns: Columns that decide a row's side where no ``split_column`` is given: copies stay together.
        """
        table = self.read("path")
        if self.val_path is not None:
            return table, self.read("val_path")
        if not self.val_fraction:
            return table, None
        columns = [self.split_column] if self.split_column is not None else list(text_columns)
        return split_table(self.where("path"), table, self.val_fraction, columns)

    def cased(self, text: str) -> str:
        """The text, in lower case if asked for."""
        return text.lower() if self.lower_case else text

    def load_tokenizer(self) -> Any:
        """The tokenizer given, else that of the module being trained."""
        return resolve_tokenizer(type(self).__name__, self.tokenizer_source, self.trainer)

    def setup(self, stage: str) -> None:
        """Silences remarks of Lightning's that mislead here.

        Two are about worker processes, which prepared rows have no use for; one is about validation without data,
        which is allowed in ``fit``.
        """
        for remark in (
            ".*does not have many workers which may be a bottleneck",
            "Your `IterableDataset` has `__len__` defined",
            "Total length of `list` across ranks is zero",
        ):
            warnings.filterwarnings("ignore", message=remark)


class RowDataModule(TableDataModule):
    """Data modules over ready rows: Lightning deals the batches to ranks; the order comes from the seed.

    ``batch_size`` is that of each rank, as usual in Lightning.
    """

    train_rows: list[Any]
    val_rows: list[Any]

    def setup(self, stage: str) -> None:
        """Rows are read anew."""
        super().setup(stage)
        self.__dict__.pop("_fingerprint", None)

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        """A batch of some rows."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What tells whether the loader's place in the rows still means the same."""
        # those of a callback (PTXLoss) are no rank's own: every rank sees the whole batch
        dealt = self.trainer if getattr(self.trainer, "datamodule", None) is self else None
        world_size = dealt.world_size if dealt else 1
        identity = {"rows": len(self.train_rows), "batch_size": self.batch_size * world_size, "seed": self.seed}
        return {**identity, "fingerprint": self._fingerprint}

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for row in self.train_rows:
            digest.update(_as_bytes(row))
        return digest.hexdigest()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare.

        Raises:
            ValueError: The data, the seed or the batch of all ranks are not those of the saved run.
        """
        if self.trainer is not None and self.trainer.state.fn == "fit":
            check_identity(self, state_dict, self.state_dict(), "rows")

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled anew every epoch; resumable within one."""
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        rows: Any = self.train_rows
        sampler = EpochSampler(rows, num_replicas=world_size, rank=rank, seed=self.seed)
        return ResumableLoader(rows, batch_size=self.batch_size, sampler=sampler, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation rows in the order of the file; nothing if there are none."""
        if not self.val_rows:
            return []
        rows: Any = self.val_rows
        collate: Callable[[list[Any]], Any] = self.collate
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=collate)


def check_identity(data: TableDataModule, saved: dict[str, Any], now: dict[str, Any], what: str) -> None:
    """Refuse to go on in other data than a checkpoint was written in.

    Args:
        data: For messages.
        saved: What identified the data, from the checkpoint.
        now: The same of the data at hand.
        what: What they are: prompts, rows.

    Raises:
        ValueError: Names the argument, both values and what to do.
    """
    for name, value in now.items():
        if saved[name] != value:
            reason = f"the training {what} differ" if name == "fingerprint" else f"{name} was {saved[name]}"
            argument = {"seed": "_seed", "batch_size": "batch_size"}.get(name, "path")
            raise ValueError(
                f"{data.where(argument)}: cannot go on where the checkpoint stopped, as {reason} when it was written "
                f"(now: {value}); restore it, or start a new run from the exported model"
            )


def _as_bytes(row: Any) -> bytes:
    if isinstance(row, np.ndarray):
        return row.tobytes() + b"|"
    if isinstance(row, dict):
        return b"".join(str(key).encode() + _as_bytes(value) for key, value in row.items())
    if isinstance(row, list | tuple):
        return b"".join(map(_as_bytes, row)) + b"|"
    return repr(row).encode() + b"|"
