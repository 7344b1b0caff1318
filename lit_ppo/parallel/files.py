"""Files and folders that are written under a temporary name of their own and appear once they are complete."""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILES = "lit_ppo_files.json"  # in a folder that an export wrote; names its files
PARTIAL = ".partial"  # suffix of a temporary folder, which holds nothing but these two:
NEW, OLD = "new", "old"  # what is being written, and what it replaces


@contextlib.contextmanager
def atomic_path(target: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A temporary path, whose content is moved to ``target`` once it is on the disk.

    A file replaces a file in one step, and so does a folder that is new. A folder that exists stays, with its
    permissions and the links to it; its content is replaced. If anything fails, ``target`` is as it was. What killed
    processes left of the same target goes; no other name is touched.

    Args:
        target: File or folder.
        check: Called right before ``target`` is replaced; may raise.
    """
    parent = target if target.is_dir() else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    left = abandoned(parent, glob.escape(target.name))
    with contextlib.ExitStack() as held:
        with _locked(parent):
            temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=PARTIAL, dir=parent))
            held.callback(shutil.rmtree, temporary, ignore_errors=True)
            held.enter_context(_locked(temporary))
        new = temporary / NEW
        yield new
        for path in [*(new.rglob("*") if new.is_dir() else ()), new]:
            _sync(path)
        with _locked(parent):  # two processes may write the same folder
            check()
            if new.is_dir() and target.is_dir():
                _replace_content(target, new, temporary / OLD)
            else:
                new.replace(target)
        _sync(parent)
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)


def abandoned(folder: Path, name: str) -> list[Path]:
    """Temporary folders of :func:`atomic_path` that no process uses any more, since theirs was killed.

    Args:
        folder: Where to look.
        name: Pattern of the targets' names.
    """
    with _locked(folder):
        found = folder.glob(f"{name}.????????{PARTIAL}")
        return [path for path in found if is_temporary(path) and not _is_locked(path)]


def is_temporary(path: Path) -> bool:
    """Whether this is a temporary folder of :func:`atomic_path`."""
    is_folder = path.name.endswith(PARTIAL) and path.is_dir() and not path.is_symlink()
    return is_folder and {inner.name for inner in path.iterdir()} <= {NEW, OLD}


def _replace_content(target: Path, new: Path, old: Path) -> None:
    """Move the content of ``target`` to ``old``, and that of ``new`` to ``target``, or change nothing.

    Between the two, no mixture passes for a model: JSON files, its configuration among them, are the first to go and
    the last to come. The list of files is the last to go and the first to come, so that it names all that is there.
    """
    done: list[tuple[Path, Path]] = []

    def move(paths: list[Path], folder: Path) -> None:
        for path in paths:
            path.rename(folder / path.name)
            done.append((folder / path.name, path))

    def order(path: Path) -> int:
        return 2 if path.name == FILES else int(path.suffix != ".json")

    old.mkdir()
    try:
        found = [path for path in target.iterdir() if not is_temporary(path)]
        move(sorted(found, key=order), old)
        move(sorted(new.iterdir(), key=order, reverse=True), target)
    except BaseException:
        for moved, path in reversed(done):
            moved.rename(path)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out while the body runs, where the system can lock; a killed process lets go."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_locked(folder: Path) -> bool:
    """Whether a process holds it; True if that cannot be known."""
    if fcntl is None:
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sync(path: Path) -> None:
    """Write a file's content, or a folder's list of names, to the disk."""
    is_folder = path.is_dir()
    with contextlib.suppress(OSError) if is_folder else contextlib.nullcontext():  # not every system syncs folders
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
