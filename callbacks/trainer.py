"""What callbacks use of the Trainer: its precision, data, ranks and loggers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader


@contextmanager
def as_in_a_step(trainer: Any) -> Iterator[None]:
    """Run models in the trainer's precision and without gradients. Lightning does this for steps, not for hooks."""
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        yield


def make_ready(data: L.LightningDataModule, trainer: L.Trainer) -> None:
    """Prepare a callback's own data on the first process, then set it up for ``fit`` on every process."""
    data.trainer = trainer
    rank_zero_only(data.prepare_data)()
    trainer.strategy.barrier("data of a callback")
    data.setup("fit")


def of_first_process(trainer: Any, find: Callable[[], Any]) -> Any:
    """Call a function on the first process and return its result on every rank.

    Use it for anything that might differ between ranks, such as a file that somebody writes to.

    Args:
        trainer: The trainer.
        find: Returns plain data.

    Raises:
        ValueError: The call failed; has its message. Errors other than ``OSError`` and ``ValueError`` are raised as
            they are on the first process.
    """
    found: Any = None
    failure: Exception | None = None
    if trainer.is_global_zero:
        try:
            found = find(), None
        except (OSError, ValueError) as error:
            found = None, str(error)
        except Exception as error:  # the other ranks must not wait forever
            failure, found = error, (None, f"{type(error).__name__}: {error}")
    found, problem = trainer.strategy.broadcast(found)
    if failure is not None:
        raise failure
    if problem is not None:
        raise ValueError(problem)
    return found


def batch_of(loader: DataLoader[Any], rows: list[int]) -> Any:
    """The batch that a loader makes of the given rows of its dataset; the same on every rank.

    Args:
        loader: Accepted by :func:`~lit_ppo.callbacks.checks.loader_over_rows`.
        rows: Row numbers; a single one where each row is a batch.
    """
    chosen = [loader.dataset[row] for row in rows]
    return loader.collate_fn(chosen if loader.batch_size else chosen[0])


def writers(trainer: Any, name: str) -> list[Callable[..., Any]]:
    """The method ``name`` of every logger's experiment that has it, on the first process; elsewhere none.

    Args:
        trainer: The trainer.
        name: Such as ``add_text`` of TensorBoard.
    """
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers] if trainer.is_global_zero else []
    return [getattr(experiment, name) for experiment in experiments if hasattr(experiment, name)]
