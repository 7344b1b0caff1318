"""The order of rows, which depends only on the seed and the position in training, and batches of prompts."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lit_ppo.digest import as_json


class PromptOrder:
    """The rows of the batch of each update.

    Args:
        n_rows: Rows in the data set.
        batch_size: Rows per batch; the last batch of an epoch may be smaller.
        seed: Seed of the order.

    >>> order = PromptOrder(5, batch_size=2, seed=0)
    >>> sorted(row for update in range(3) for row in order.rows(update).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int) -> None:
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self.weights: np.ndarray | None = None  # of rows; None: every row once per epoch
        self.repeat: int | None = None  # number of batches that Trainer.overfit_batches repeats
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def n_batches(self) -> int:
        """Batches per epoch."""
        return -(-self.n_rows // self.batch_size)

    def rows(self, update: int) -> np.ndarray:
        """The rows of update number ``update``, counted from 0."""
        if self.repeat is not None:
            update %= self.repeat
        if self.weights is not None:
            # a third key other than 0, since [seed, u] and [seed, u, 0] are the same seed for numpy
            rng = np.random.default_rng([self.seed, update, 1])
            size = min(self.batch_size, int(np.count_nonzero(self.weights)))
            return systematic_draws(self.weights, size, rng)
        epoch, batch = divmod(update, self.n_batches)
        if self._permutation[0] != epoch:
            self._permutation = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n_rows))
        return self._permutation[1][batch * self.batch_size : (batch + 1) * self.batch_size]


def systematic_draws(weights: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    r"""Rows drawn by weight with one random number: row i comes ``size * w_i / sum(w)`` times, rounded up or down.

    The expected number of draws is in proportion to the weights, whatever the size. Drawing without replacement would
    flatten them: of 100 rows, half of them with 10 times the weight of the others, 64 would favour them only 3.2 times.

    Source: systematic resampling; Kitagawa 1996, J. Comput. Graph. Stat. 5(1); Douc et al. 2005, arXiv:cs/0507025.

    Args:
        weights: One per row; rows with 0 are never drawn.
        size: Number of draws. A row with a weight of more than a ``size``-th of the sum can come several times.
        rng: Also shuffles the rows before and after, so that neighbours are drawn independently.
    """
    rows = rng.permutation(np.flatnonzero(weights))
    ends = np.cumsum(weights[rows])
    points = (rng.random() + np.arange(size)) * (ends[-1] / size)
    places = np.searchsorted(ends, points, side="right").clip(max=len(rows) - 1)  # the last point may round up
    return rng.permutation(rows[places])


def checked_weights(where: str, weights: Sequence[float] | np.ndarray | Tensor, n_rows: int) -> np.ndarray:
    """Sampling weights as an array.

    Raises:
        ValueError: They are not one finite, non-negative number per row, or all are 0.
    """
    array = torch.as_tensor(weights, dtype=torch.float64).cpu().numpy().copy()
    if array.shape != (n_rows,):
        raise ValueError(f"{where}: shape {array.shape}, but there are {n_rows} training rows; give one weight per row")
    if not np.isfinite(array).all() or (array < 0).any():
        worst = int(np.argmax(~np.isfinite(array) | (array < 0)))
        raise ValueError(f"{where}: the weight of row {worst} is {array[worst]}; give finite, non-negative weights")
    if not array.any():
        raise ValueError(f"{where}: all weights are 0; give at least one row a positive weight")
    return array


class EpochSampler(DistributedSampler[Any]):
    """This rank's part of a permutation per epoch, from ``start`` on.

    Lightning keeps a ``DistributedSampler`` and sets its epoch; with several ranks it would replace any other sampler
    by one with another seed.
    """

    start = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(list(super().__iter__())[self.start :])


class HeldOutRows(Dataset[tuple[Any, int]]):
    """Each row with weight 1, then repeats of weight 0 until all ranks have equally many.

    A sharded model needs as many forwards on every rank, but each row should count once.

    >>> [*HeldOutRows(["a", "b", "c"], n_ranks=2)]
    [('a', 1), ('b', 1), ('c', 1), ('a', 0)]
    """

    def __init__(self, rows: Sequence[Any], n_ranks: int) -> None:
        self.rows, self.n_ranks = rows, n_ranks

    def __len__(self) -> int:
        return -(-len(self.rows) // self.n_ranks) * self.n_ranks

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.rows[index % len(self.rows)], int(index < len(self.rows))


class ResumableLoader(DataLoader[Any]):
    """A loader that Lightning considers resumable; its position is counted elsewhere."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


class RowLoader(ResumableLoader):
    """A loader of rows that begins at the batch of the epoch that the Trainer asks for.

    Only the Trainer's loop knows when an epoch that ``limit_train_batches`` or ``overfit_batches`` shortens is over.

    Args:
        dataset: The rows.
        trainer: The one that trains on them; None: every pass begins at the first batch.
        **options: Of ``DataLoader``.
    """

    def __init__(self, dataset: Any, trainer: L.Trainer | None = None, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.trainer = trainer  # under this name Lightning finds it, if it builds the loader again with another sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        skipped = start
        if isinstance(self.sampler, EpochSampler):  # overfit_batches replaces it
            self.sampler.start, skipped = start * (self.batch_size or 1), 0
        with torch.random.fork_rng(devices=[], enabled=start > 0):  # the epoch has drawn its number before
            batches = super().__iter__()
        yield from islice(batches, skipped, None)


@dataclass
class PromptBatch:
    """The prompts of one update, of all ranks.

    Args:
        prompts: Plain text; chat prompts as rendered by the template.
        prompt_ids: Tokens, cut from the left to the maximum length.
        prompt_index: (B,) int64, rows in the data set.
        columns: All other columns; for chat prompts also ``"messages"``, the message lists.
    """

    prompts: list[str]
    prompt_ids: list[list[int]]
    prompt_index: Tensor
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: Any, **kwargs: Any) -> "PromptBatch":
        """The batch with its index on ``device``; text and ids are lists."""
        return replace(self, prompt_index=self.prompt_index.to(device, **kwargs))


@dataclass
class PromptTable:
    """All prompts of a file."""

    prompts: list[str]
    prompt_ids: list[list[int]]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, rows: list[int]) -> PromptBatch:
        """A batch of these rows."""
        return PromptBatch(
            [self.prompts[i] for i in rows],
            [self.prompt_ids[i] for i in rows],
            torch.tensor(rows, dtype=torch.int64),
            {name: [values[i] for i in rows] for name, values in self.columns.items()},
        )

    @cached_property
    def fingerprint(self) -> str:
        """A digest of texts and columns, which changes with the data."""
        digest = hashlib.sha256()
        for i, prompt in enumerate(self.prompts):
            row = [prompt, {name: values[i] for name, values in self.columns.items()}]
            digest.update(as_json(row).encode())
        return digest.hexdigest()


class TrainingPrompts(IterableDataset[PromptBatch]):
    """One epoch of batches from the current position.

    It has a length, so that Lightning does not prefetch: the rows of an update are drawn when it starts, since the
    previous update may change the sampling weights. It is not a map-style data set, which Lightning would split over
    ranks.

    Args:
        table: The prompts.
        order: The rows of each batch.
        position: Number of batches drawn so far; counted before a batch is yielded.
    """

    def __init__(self, table: PromptTable, order: PromptOrder, position: int = 0) -> None:
        self.table, self.order, self.position = table, order, position

    def __len__(self) -> int:
        return self.order.n_batches

    def __iter__(self) -> Iterator[PromptBatch]:
        # always a full epoch: with Trainer.limit_train_batches the next one starts in the middle of the permutation
        for _ in range(len(self)):
            rows = self.order.rows(self.position)
            self.position += 1
            yield self.table.batch(rows.tolist())


class HeldOutPrompts(IterableDataset[PromptBatch]):
    """Batches of held-out prompts, in the order of the file."""

    def __init__(self, table: PromptTable, batch_size: int) -> None:
        self.table, self.batch_size = table, batch_size

    def __len__(self) -> int:
        return -(-len(self.table) // self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        for start in range(0, len(self.table), self.batch_size):
            yield self.table.batch(list(range(start, min(start + self.batch_size, len(self.table)))))
