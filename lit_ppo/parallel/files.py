"""Files and folders that are written under a temporary name of their own, and the checksums of what was written.

A checkpoint in one file is a zip archive, which holds the CRC-32 of each entry; PyTorch writes it and does not compare
it. A folder gets a ``checksums.json`` with the CRC-32 of each file. CRC-32 finds every change of up to 32 bits in a
row, and zlib computes it several times as fast as PyTorch writes.
"""

import contextlib
import glob
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lit_ppo.parallel.ranks import gather_shares, n_ranks, rank

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILES = "lit_ppo_files.json"  # in a folder that an export wrote; names its files
PARTIAL = ".partial"  # suffix of a temporary folder, which holds nothing but these two:
NEW, OLD = "new", "old"  # what is being written, and what it replaces
CHECKSUMS = "checksums.json"
VERIFY = "LIT_PPO_VERIFY"  # environment variable; "0" skips the comparison
WEIGHTS = (".safetensors", ".bin")
TEXTS = (".json", ".jinja", ".txt", ".model")  # configuration and tokenizer, which people edit
CHUNK = 2**20  # bytes


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


class DamagedFileError(ValueError):
    """A file differs from its checksum; the message names the file."""


def verify(path: Path) -> None:
    """Compare a checkpoint, in one file or in a folder, with its checksums.

    A file or folder that did not change since an earlier call is not read again.

    Raises:
        DamagedFileError: A file differs, or is missing.
    """
    if os.environ.get(VERIFY) != "0":
        _verify_folder(path, _stamps(path.iterdir())) if path.is_dir() else _verify_archive(path, _stamps([path]))


def verify_model(folder: Path) -> None:
    """Compare the files of a model with the checksums that its export wrote, if it has any.

    Changed weights are refused. A changed configuration or tokenizer, which may be meant, is warned about.

    Raises:
        DamagedFileError: A file of weights differs.
    """
    if os.environ.get(VERIFY) != "0" and (folder / CHECKSUMS).is_file():
        _verify_model(folder, _stamps(folder.iterdir()))


def write_checksums(folder: Path) -> None:
    """Write the checksums of a model's folder: weights, configuration and tokenizer, not the model card."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (*WEIGHTS, *TEXTS) and path.is_file())
    _write(folder, {name: checksum(folder / name) for name in names if name not in (CHECKSUMS, FILES)})


def write_shared_checksums(folder: Path) -> None:
    """Write the checksums of a checkpoint that is a folder; each rank reads its share of the files. Collective."""

    def listing() -> list[str]:
        found = folder.iterdir() if folder.is_dir() else ()
        return sorted(path.name for path in found if path.is_file() and path.name != CHECKSUMS)

    names = gather_shares(lambda: listing() if rank() == 0 else [])[0]
    if not names:
        return
    shares = gather_shares(lambda: {name: checksum(folder / name) for name in names[rank() :: n_ranks()]})
    found = {name: value for share in shares for name, value in share.items()}
    gather_shares(lambda: _write(folder, dict(sorted(found.items()))) if rank() == 0 else None)


def checksum(file: Path) -> str:
    """The CRC-32 of a file, as eight hexadecimal digits."""
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def _write(folder: Path, values: dict[str, str]) -> None:
    text = json.dumps({"crc32": values}, indent=2) + "\n"
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")


def _read(folder: Path) -> dict[str, str]:
    try:
        values = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["crc32"]
        return {str(name): str(value) for name, value in values.items()}
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise DamagedFileError(f"{CHECKSUMS} is damaged: it is not the list that was written") from error


def _stamps(files: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times, which change with each write."""
    found = [(file.name, file.stat()) for file in files]
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found))


@lru_cache(maxsize=64)
def _verify_archive(path: Path, stamps: object) -> None:
    with path.open("rb") as stream:
        if stream.read(2) != b"PK":
            return  # the older format of torch.save, which has no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, ValueError, zlib.error) as error:
        raise DamagedFileError(f"{path.name} is damaged: {str(error)[:120] or 'it ends too early'}") from error
    if damaged is not None:
        raise DamagedFileError(
            f"{path.name} is damaged: its entry {damaged.partition('/')[2]!r} differs from its checksum"
        )


@lru_cache(maxsize=64)
def _verify_folder(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> None:
    if (folder / CHECKSUMS).is_file():
        for name, value in _read(folder).items():
            _compare(folder / name, value)
        return
    rank_zero_warn(f"checkpoint {folder}: has no {CHECKSUMS}, so its shards are not checked for damage")
    for name in (name for name, *_ in stamps if name.endswith(".pt")):
        _verify_archive(folder / name, _stamps([folder / name]))


@lru_cache(maxsize=64)
def _verify_model(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> None:
    changed = []
    for name, value in _read(folder).items():
        if not (folder / name).is_file():
            continue  # the weights may have been converted; transformers misses what it needs
        if name.endswith(WEIGHTS):
            _compare(folder / name, value)
        elif checksum(folder / name) != value:
            changed.append(name)
    if changed:
        rank_zero_warn(
            f"{folder}: changed since it was exported: {', '.join(changed)}; if you did not change it, export the "
            f"model again; if you did, delete {CHECKSUMS} there"
        )


def _compare(file: Path, value: str) -> None:
    if not file.is_file():
        raise DamagedFileError(f"{file.name} is missing, and {CHECKSUMS} lists it")
    if checksum(file) != value:
        raise DamagedFileError(f"{file.name} is damaged: it differs from its checksum in {CHECKSUMS}")
