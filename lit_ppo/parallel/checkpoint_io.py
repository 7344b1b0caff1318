"""Atomic checkpoint files, and error messages for checkpoints that cannot be written or read."""

import contextlib
import functools
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException

from lit_ppo.parallel.entries import EntryError, check_kinds, check_plain, load_full
from lit_ppo.parallel.files import CHECKSUMS, DamagedFileError, atomic_path, verify, write_shared_checksums
from lit_ppo.parallel.ranks import gather_shares, rank
from lit_ppo.shown import first_line

HELD = 4.0  # seconds for which Ctrl-C waits for a checkpoint; the command forces its exit after 8
METADATA = "meta.pt"  # what Lightning writes last into a sharded checkpoint, which is a folder
DELETE = "delete it, and 'lit-ppo fit --ckpt_path last' finds the previous one"
GIVE_ANOTHER = "give a checkpoint from a run's folder"
UNREADABLE = (
    OSError, EOFError, RuntimeError, LookupError, ValueError, AttributeError, TypeError, AssertionError, MemoryError,
    OverflowError, pickle.UnpicklingError, CheckpointException,
)  # fmt: skip  # what torch raises about a damaged file


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and says what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint differs from what was written.

    Args:
        path: The checkpoint.
        reason: What is wrong with it.
        remedy: What to do.
    """

    def __init__(self, path: Any, reason: str, remedy: str) -> None:
        super().__init__(f"checkpoint {path}: {reason}; {remedy}")
        self.reason = reason


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
                _save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError after a failed write
            raise _unwritable(path, error) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            CheckpointError: It is damaged, not a training checkpoint, or holds more than plain data.
        """
        with readable(path):
            checkpoint = super().load_checkpoint(path, map_location, weights_only is not False)
        check_keys(path, checkpoint)
        return checkpoint


def save_checked(strategy: Any, checkpoint: dict[str, Any], path: Path) -> None:
    """Let a strategy write a checkpoint, and add checksums if it writes a folder. Collective.

    Ctrl-C takes effect afterwards, or after ``HELD`` seconds: torch may abort the process if it is interrupted.

    Raises:
        CheckpointError: The checkpoint cannot be written.
        RuntimeError: Another rank cannot write it.
    """

    def save() -> None:
        try:
            strategy.save_checkpoint(checkpoint, path)
        except CheckpointException as error:  # not an Exception
            raise _unwritable(path, next(iter(error.failures.values()))[0]) from error

    with _late_interrupt():
        # a folder that is written again is not complete before its metadata is
        gather_shares(lambda: _invalidate(path) if rank() == 0 else None)
        gather_shares(save)
        write_shared_checksums(path)


@contextlib.contextmanager
def _late_interrupt() -> Iterator[None]:
    """Hold back the first Ctrl-C until the end, for ``HELD`` seconds at most, then call the handler set before."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # no handler of Python's would run here
        return
    received: list[int] = []
    again = threading.Timer(HELD, signal.raise_signal, (signal.SIGINT,))
    again.daemon = True

    def hold(number: int, frame: FrameType | None) -> Any:
        received.append(number)
        return before(number, frame) if len(received) > 1 else again.start()

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        again.cancel()
        signal.signal(signal.SIGINT, before)
    if received:
        signal.raise_signal(signal.SIGINT)


def _invalidate(path: Path) -> None:
    for file in (path / METADATA, path / CHECKSUMS):
        if path.is_dir():
            file.unlink(missing_ok=True)


def use_atomic_checkpoints(trainer: L.Trainer) -> None:
    """Let the trainer's strategy write and read with ``AtomicCheckpointIO``, unless it was given its own plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def guard_sharded(trainer: L.Trainer) -> None:
    """Let the trainer's strategy load a sharded checkpoint only after a check that it is intact, plain data.

    Strategies let torch unpickle parts of it, even where they are asked for weights only.
    """
    strategy: Any = trainer.strategy
    load = strategy.load_checkpoint
    if getattr(load, "is_guarded", False):
        return

    @functools.wraps(load)
    def load_plain(checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        if Path(checkpoint_path).is_dir():
            with readable(checkpoint_path):
                if weights_only is not False:
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
    summary = read_summary(path)
    with readable(path):
        check_plain(path)
        return {**summary, **load_full(path)}


def is_complete(checkpoint: Path) -> bool:
    """False for a sharded checkpoint, as some of Lightning's strategies write it, whose writing was cut short."""
    return not checkpoint.is_dir() or (checkpoint / METADATA).is_file()


def read_summary(path: Path, *, compare: bool = True) -> dict[str, Any]:
    """Read a checkpoint of any strategy, but leave its tensors on the disk.

    Args:
        path: The checkpoint.
        compare: Compare it with its checksums, which reads all of it.

    Raises:
        CheckpointError: It cannot be read.
    """
    if not is_complete(path):
        raise DamagedCheckpointError(
            path, f"a folder without {METADATA}, so it is no checkpoint, or its writing was cut short", GIVE_ANOTHER
        )
    with readable(path, compare=compare):
        file = path / METADATA if path.is_dir() else path
        summary: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    check_keys(path, summary)
    return summary


@contextlib.contextmanager
def readable(path: Any, *, compare: bool = True) -> Iterator[None]:
    """Compare a checkpoint with its checksums, and turn torch's errors about it into a ``CheckpointError``."""
    try:
        if compare and "://" not in str(path):
            verify(Path(path))
        yield
    except (FileNotFoundError, CheckpointError):
        raise
    except DamagedFileError as error:
        raise DamagedCheckpointError(path, str(error), DELETE) from error
    except UNREADABLE as error:
        if "Weights only load failed" in str(error) and "Unsupported global" in str(error):
            raise CheckpointError(
                f"checkpoint {path}: holds more than plain data, and reading it would run code; give a checkpoint that "
                "lit-ppo wrote, or resume it with --weights_only false if you trust its source"
            ) from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        problem = f"cannot be read, it is damaged or not a checkpoint ({reason[0][:120]})"
        raise DamagedCheckpointError(path, problem, DELETE) from error


def check_keys(path: Any, checkpoint: Any) -> None:
    """Check that something read from ``path`` is a training checkpoint, and the kinds of its entries.

    Raises:
        CheckpointError: It is not; names what is missing or changed.
    """
    found = checkpoint if isinstance(checkpoint, dict) else {}
    is_sharded = Path(path).is_dir()
    keys = ("pytorch-lightning_version",) if is_sharded else ("state_dict", "pytorch-lightning_version")
    missing = [key for key in keys if key not in found]
    if missing:
        raise CheckpointError(
            f"checkpoint {path}: not a training checkpoint; missing: {', '.join(missing)}; {GIVE_ANOTHER}"
        )
    with checked_entries(path):
        check_kinds(found)


@contextlib.contextmanager
def checked_entries(path: Any) -> Iterator[None]:
    """Name the checkpoint in an error about one of its entries."""
    try:
        yield
    except EntryError as error:
        raise DamagedCheckpointError(path, f"{error}: it was changed, or saved without it", GIVE_ANOTHER) from error


def _save(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(checkpoint, file)
    except BaseException as error:
        # torch's writer lives in these frames. It writes the end of the file when it goes, and aborts the process if
        # the file is closed by then: after Ctrl-C, for example.
        traceback.clear_frames(error.__traceback__)
        raise


def _unwritable(path: Any, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path}: cannot be written ({_os_error(error)}); the previous checkpoint is kept. "
        "Free disk space or check the folder, then continue with --ckpt_path last"
    )


def _os_error(error: BaseException) -> str:
    """The system's words for the cause of an error, which torch may have wrapped."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return (cause and cause.strerror) or first_line(error)
