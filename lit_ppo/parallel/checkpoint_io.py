"""Atomic checkpoint files, and error messages for checkpoints that cannot be written or read."""

import contextlib
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_ppo.shown import first_line

PARTIAL = ".partial"  # suffix of what is being written
METADATA = "meta.pt"  # what Lightning writes last into a sharded checkpoint, which is a folder


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and says what to do."""


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside ``target``, which gets the name of ``target`` once its content is on the disk.

    If the body fails, the temporary file or folder is removed and ``target`` stays as it was.

    Args:
        target: File or folder, replaced if it exists.
    """
    partial, old = (target.with_name(target.name + suffix) for suffix in (PARTIAL, f".old{PARTIAL}"))
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove(old)
    _remove(partial)
    try:
        yield partial
        for path in [*(partial.rglob("*") if partial.is_dir() else ()), partial]:
            _sync(path)
        if target.is_dir():  # a folder cannot be replaced in one step
            target.rename(old)
        partial.replace(target)
        _sync(target.parent)
    finally:
        _remove(partial)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(path: Path) -> None:
    """Write a file's content, or a folder's list of names, to the disk."""
    is_folder = path.is_dir()
    with contextlib.suppress(OSError) if is_folder else contextlib.nullcontext():  # not every system syncs folders
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
    except (OSError, EOFError, RuntimeError, LookupError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        if "Weights only load failed" in str(error) and "Unsupported global" in str(error):
            raise CheckpointError(
                f"checkpoint {path}: holds more than plain data, and reading it would run code; give a checkpoint that "
                "lit-ppo wrote, or add --weights_only false if you trust its source"
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
