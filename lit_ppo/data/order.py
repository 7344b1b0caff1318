"""In which order rows are seen: a function of the seed and of how far training has come, of nothing else."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler


class PromptOrder:
    """Which rows make up the batch of each update.

    Args:
        n_rows: Rows in the data set.
        batch_size: Rows of a batch; the last one of an epoch may be smaller.
        seed: Seed of the order.

    >>> order = PromptOrder(5, batch_size=2, seed=0)
    >>> sorted(row for update in range(3) for row in order.rows(update).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int) -> None:
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self.weights: np.ndarray | None = None  # by row; None: every row once an epoch
        self.repeat: int | None = None  # see the same first batches again and again (Trainer.overfit_batches)
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def n_batches(self) -> int:
        """Batches of an epoch."""
        return -(-self.n_rows // self.batch_size)

    def rows(self, update: int) -> np.ndarray:
        """The rows of update number ``update``, counted from 0."""
        if self.repeat is not None:
            update %= self.repeat
        if self.weights is not None:
            # a third key that is not 0, as numpy takes [seed, u] and [seed, u, 0] for the same
            rng = np.random.default_rng([self.seed, update, 1])
            size = min(self.batch_size, int(np.count_nonzero(self.weights)))
            return rng.choice(self.n_rows, size=size, replace=False, p=self.weights / self.weights.sum())
        epoch, batch = divmod(update, self.n_batches)
        if self._permutation[0] != epoch:
            self._permutation = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n_rows))
        return self._permutation[1][batch * self.batch_size : (batch + 1) * self.batch_size]


def checked_weights(where: str, weights: Sequence[float] | np.ndarray | Tensor, n_rows: int) -> np.ndarray:
    """Sampling weights as an array.

    Raises:
        ValueError: They are not one finite, non-negative number a row, or all of them are 0.
    """
    array = torch.as_tensor(weights, dtype=torch.float64).cpu().numpy().copy()
    if array.shape != (n_rows,):
        raise ValueError(f"{where}: shape {array.shape}, but there are {n_rows} training rows; give one weight a row")
    if not np.isfinite(array).all() or (array < 0).any():
        worst = int(np.argmax(~np.isfinite(array) | (array < 0)))
        raise ValueError(f"{where}: the weight of row {worst} is {array[worst]}; weights are finite and not negative")
    if not array.any():
        raise ValueError(f"{where}: all weights are 0; at least one row must be drawable")
    return array


class EpochSampler(DistributedSampler[Any]):
    """A permutation of each epoch from seed and epoch, this rank's share of it, from ``start`` on.

    Lightning keeps a ``DistributedSampler`` as it is and tells it the epoch; any other sampler it would replace by
    one of its own when there are several ranks, with another seed.
    """

    start = 0

    def __iter__(self) -> Iterator[Any]:
        return iter(list(super().__iter__())[self.start :])


class ResumableLoader(DataLoader[Any]):
    """A loader whose place in the epoch is saved with Lightning's loops and found again."""

    _batches = 0  # handed out in this epoch
    _start = 0  # where the next pass starts

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._batches, self._start = self._start, 0
        if isinstance(self.sampler, EpochSampler):  # overfit_batches puts another one in its place
            self.sampler.start = self._batches * (self.batch_size or 1)
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The batches of this epoch that are done."""
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on behind them, or with the next epoch behind the last."""
        self._start = state_dict["batches"] % len(self)


class PromptLoader(DataLoader[Any]):
    """A loader that Lightning takes for resumable, as it is: the data module saves its place."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing; see the data module's."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing; see the data module's."""
