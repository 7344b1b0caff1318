"""The folder that an export writes: only what an export has written there may be replaced."""

import json
import os
import tempfile
from pathlib import Path

from lit_ppo.models.export import MODEL_FILE, file_digest, file_names
from lit_ppo.parallel.files import FILES, OLD, is_temporary
from lit_ppo.rewards.folders import check_not_read

CONFIGS = ("config.json", "adapter_config.json")
SHOWN = 8  # names of files in the way


def check_target(where: str, folder: Path, used: dict[str, str] | None = None) -> None:
    """Check that an export may write this folder, and replace what is in it.

    Args:
        where: Class or option, argument and value, for messages.
        folder: Of the model.
        used: Folders that the run reads, by the name of their setting.

    Raises:
        ValueError: Something would be lost: a file, or a folder with anything that no export has written.
    """
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{where}: is a link to {os.readlink(folder)}, which does not exist; name a folder")
    check_not_read(where, folder, used or {})
    if found := in_the_way(folder) if folder.is_dir() else []:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(
            f"{where}: the folder holds files that no export has written: {', '.join(found[:SHOWN])}{more}; name a new "
            "folder, or move them away"
        )
    _check_writable(where, folder)


def in_the_way(folder: Path) -> list[str]:
    """Names in a folder that no export has written as it is; those that models do not have come first."""
    ours = _written(folder)
    names = set(file_names(folder)) if ours else {path.name for path in folder.iterdir() if not is_temporary(path)}
    foreign = sorted(names - ours.keys(), key=lambda name: (bool(MODEL_FILE.fullmatch(name)), name))
    edited = [name for name in sorted(names & ours.keys()) if ours[name] not in ("", file_digest(folder / name))]
    return [*foreign, *(f"{name} (edited)" for name in edited)]


def _written(folder: Path) -> dict[str, str]:
    """The files that an export wrote into a folder, with their digests; empty where none did, or it is no model."""
    try:
        files = json.loads((folder / FILES).read_text(encoding="utf-8"))["files"]
        ours = {str(name): str(digest) for name, digest in files.items()} | {FILES: ""}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    is_taken_apart = any(name in ours and not (folder / name).exists() for name in CONFIGS)
    was_killed = any(is_temporary(path) and (path / OLD).exists() for path in folder.iterdir())
    return {} if is_taken_apart and not was_killed else ours


def _check_writable(where: str, folder: Path) -> None:
    nearest = folder if folder.is_dir() else next(parent for parent in folder.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise ValueError(f"{where}: {nearest} cannot be written to ({error.strerror}); name another folder") from error
