"""Atomic checkpoint files, and error messages for checkpoints that cannot be written or read."""

import contextlib
import functools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_ppo.parallel.files import atomic_path
from lit_ppo.parallel.sharded_checkpoint import check_plain, load_full
from lit_ppo.shown import first_line

ALTERED = (LookupError, TypeError, ValueError, AttributeError)  # raised by pickles with other values than torch's
METADATA = "meta.pt"  # what Lightning writes last into a sharded checkpoint, which is a folder


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and says what to do."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint under a temporary name in its own folder, and renames it once it is complete.

    Lightning's own builds the file in memory first, then in the system's temporary folder. Reading accepts plain data
    only, unless ``weights_only=False``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: The disk is full, or the folder cannot be written to.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with atomic_path(Path(path)) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError after a failed write
            raise CheckpointError(
                f"checkpoint {path}: cannot be written ({_os_error(error)}); the previous checkpoint is kept. "
                "Free disk space or check the folder, then continue with --ckpt_path last"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            CheckpointError: It is damaged, not a training checkpoint, or holds more than plain data.
        """
        with _readable(path):
            checkpoint = super().load_checkpoint(path, map_location, weights_only is not False)
        _check_keys(path, checkpoint)
        return checkpoint


def use_atomic_checkpoints(trainer: L.Trainer) -> None:
    """Let the trainer's strategy write and read with ``AtomicCheckpointIO``, unless it was given its own plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def guard_sharded(trainer: L.Trainer) -> None:
    """Let the trainer's strategy load a sharded checkpoint only after a check that it holds plain data.

    Strategies let torch unpickle parts of it, even where they are asked for weights only.
    """
    strategy: Any = trainer.strategy
    load = strategy.load_checkpoint
    if getattr(load, "is_guarded", False):
        return

    @functools.wraps(load)
    def load_plain(checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        if weights_only is not False and Path(checkpoint_path).is_dir():
            with _readable(checkpoint_path):
                check_plain(Path(checkpoint_path))
        return load(checkpoint_path, weights_only=weights_only)

    load_plain.is_guarded = True  # type: ignore[attr-defined]
    strategy.load_checkpoint = load_plain


def load_merged(path: Path) -> dict[str, Any]:
    """Load a checkpoint of any strategy with its full weights; shards are merged.

    Raises:
        CheckpointError: It cannot be read, or reading it would run code.
    """
    if not path.is_dir():
        return AtomicCheckpointIO().load_checkpoint(path)
    with _readable(path):
        check_plain(path)
        weights = load_full(path)
    return {**read_summary(path), **weights}


def is_complete(checkpoint: Path) -> bool:
    """False for a sharded checkpoint, as some of Lightning's strategies write it, whose writing was cut short."""
    return not checkpoint.is_dir() or (checkpoint / METADATA).is_file()


def read_summary(path: Path) -> dict[str, Any]:
    """Read a checkpoint of any strategy, but leave its tensors on the disk.

    Raises:
        CheckpointError: It cannot be read.
    """
    with _readable(path):
        file = path / METADATA if path.is_dir() else path
        summary: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not path.is_dir():
        _check_keys(path, summary)
    return summary


@contextlib.contextmanager
def _readable(path: Any) -> Iterator[None]:
    """Turn torch's errors about a file into a ``CheckpointError``."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, *ALTERED) as error:
        if "Weights only load failed" in str(error) and "Unsupported global" in str(error):
            raise CheckpointError(
                f"checkpoint {path}: holds more than plain data, and reading it would run code; give a checkpoint that "
                "lit-ppo wrote, or resume it with --weights_only false if you trust its source"
            ) from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"checkpoint {path}: cannot be read, it is damaged or not a checkpoint ({reason[0][:120]}); delete it, and "
            "'--ckpt_path last' finds the previous one"
        ) from error


def _check_keys(path: Any, checkpoint: Any) -> None:
    found = checkpoint if isinstance(checkpoint, dict) else {}
    missing = [key for key in ("state_dict", "pytorch-lightning_version") if key not in found]
    if missing:
        raise CheckpointError(
            f"checkpoint {path}: not a training checkpoint; missing: {', '.join(missing)}; give a checkpoint from a "
            "run's folder, or 'last'"
        )


def _os_error(error: BaseException) -> str:
    """The system's words for the cause of an error, which torch may have wrapped."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return (cause and cause.strerror) or first_line(error)
