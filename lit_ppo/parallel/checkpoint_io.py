"""Checkpoint files that are whole or not there, and words for those that cannot be read."""

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

PARTIAL = ".partial"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; names the file and what to do."""


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint straight to the disk it belongs on, under another name until it is whole.

    Lightning's own gathers the file in memory first, then in the system's folder for temporary files. Reading takes
    plain data only, unless asked otherwise.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write it, down to the disk.

        Raises:
            CheckpointError: Something came between, such as a full disk; what lay there before is unharmed.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        partial = target.with_name(target.name + PARTIAL)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
            sync(target.parent)
        except (OSError, RuntimeError) as error:  # torch has a RuntimeError of its own follow a failed write
            with contextlib.suppress(OSError):
                partial.unlink()
            raise CheckpointError(
                f"checkpoint {str(target).removesuffix(PARTIAL)}: cannot be written ({_first_os_error(error)}); the "
                "earlier ones are unharmed: make room or check the folder, then continue with --ckpt_path last"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read it.

        Raises:
            CheckpointError: It is damaged, none of a run, or holds more than plain data.
        """
        with readable(path):
            checkpoint = super().load_checkpoint(path, map_location, weights_only is not False)
        check_kind(path, checkpoint)
        return checkpoint


@contextlib.contextmanager
def readable(path: Any) -> Any:
    """Turn what torch raises for a file that it cannot read into words that name the file.

    Raises:
        CheckpointError: Says whether the file is damaged or holds more than plain data.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error) or "Unsupported global" not in str(error):
            raise CheckpointError(_damaged(path, error)) from error
        raise CheckpointError(
            f"checkpoint {path}: holds more than plain data, and reading it would run code; give one that lit-ppo "
            "wrote, or add --weights_only false if you trust whoever made it"
        ) from error
    except (OSError, EOFError, RuntimeError, LookupError, ValueError, AttributeError) as error:
        raise CheckpointError(_damaged(path, error)) from error


def check_kind(path: Any, checkpoint: Any) -> None:
    """Refuse a file that is no checkpoint of a training run.

    Raises:
        CheckpointError: Says what is missing.
    """
    missing = [key for key in ("state_dict", "pytorch-lightning_version") if key not in _keys(checkpoint)]
    if missing:
        raise CheckpointError(
            f"checkpoint {path}: is none of a training run, it lacks {' and '.join(missing)}; give a checkpoint from a "
            "run's folder, or 'last'"
        )


def _keys(checkpoint: Any) -> Any:
    return checkpoint if isinstance(checkpoint, dict) else ()


def _damaged(path: Any, error: Exception) -> str:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return (
        f"checkpoint {path}: cannot be read, it is damaged or no checkpoint at all ({reason[0][:120]}); delete it, and "
        "'--ckpt_path last' finds the one before"
    )


def read_summary(path: Path) -> dict[str, Any]:
    """A checkpoint of whatever strategy without reading its tensors: they stay on the disk.

    Raises:
        CheckpointError: It cannot be read.
    """
    file = path / "meta.pt" if path.is_dir() else path  # a sharded one is a folder
    with readable(path):
        summary: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not path.is_dir():
        check_kind(path, summary)
    return summary


def use_whole_files(trainer: L.Trainer) -> None:
    """Have the trainer's checkpoints written and read this way, unless it was given another."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeFiles()


def sync(path: Path) -> None:
    """Bring a file, or a folder and all in it, to the disk: a crash of the machine then finds it."""
    for entry in [*(path.rglob("*") if path.name.endswith(PARTIAL) and path.is_dir() else ()), path]:
        with contextlib.suppress(OSError):  # not every system can sync a folder
            descriptor = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def put_in_place(partial: Path, target: Path) -> None:
    """Rename what is whole; there is no moment at which neither the old nor the new one is there."""
    sync(partial)
    if target.is_dir():  # a folder cannot be replaced in one step
        old = target.with_name(f"{target.name}.old{PARTIAL}")
        target.rename(old)
    partial.replace(target)
    sync(target.parent)


def _first_os_error(error: BaseException) -> str:
    """What the system said, under what torch made of it."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link.strerror or str(link)
        link = link.__cause__ or link.__context__
    return str(error).splitlines()[0]
