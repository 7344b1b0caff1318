"""The configurations that come with the package: their names, what they say of themselves, and copies to edit."""

import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from lit_ppo.run.errors import CommandError

_PACKAGE = Path(__file__).resolve().parents[1]
# inside an installed package; beside it in the repository
FOLDER = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), _PACKAGE)
KINDS = {
    "": "Jobs and published recipes",
    "tricks": "Tricks, to apply on top of a job",
    "monitors": "Monitors, to apply on top of a job",
    "strategy": "Many processes, to apply on top of a job",
    "quickstart": "Stages of quickstart",
    "sentiment": "Stages of sentiment",
}


def names() -> list[str]:
    """All names, such as ``tricks/adaptive_kl``."""
    files = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml")]
    return sorted(files, key=lambda name: (list(KINDS).index(kind(name)), name))


def kind(name: str) -> str:
    """The folder of a configuration.

    >>> kind("tricks/adaptive_kl"), kind("ppo")
    ('tricks', '')
    """
    folder = name.rpartition("/")[0]
    return folder if folder in KINDS else ""


def path_of(name: str) -> Path | None:
    """The file of a name; its suffix, and the folder that it has in the repository, may be given, too."""
    name = os.path.normpath(name).replace(os.sep, "/").removesuffix(".yaml").removeprefix("configs/")
    return FOLDER / f"{name}.yaml" if name in names() else None


def find(text: str, folder: str | Path = ".") -> str:
    """The configuration file that a text stands for.

    Args:
        text: A path, with or without ``.yaml``, or the name of a configuration that comes with the package.
        folder: Where a relative path starts. A file there wins over a name.

    Returns:
        Its path, or the text itself if it is neither: a URL or YAML.
    """
    if not is_name(text):
        return text
    beside = os.path.normpath(Path(folder, os.path.expanduser(text)))
    return next((file for file in (beside, f"{beside}.yaml") if is_file(file)), None) or str(path_of(text) or text)


def is_file(path: str) -> bool:
    """Whether it can be read: it exists and is no folder. A shell's ``<(command)`` is a pipe."""
    return os.path.exists(path) and not os.path.isdir(path)


def is_name(text: str) -> bool:
    """Whether a text can be a path or a name: it is no URL, no mapping in YAML, and not the standard input.

    >>> is_name("my file.yaml"), is_name("trainer: {max_steps: 1}"), is_name("https://host/x.yaml")
    (True, False, False)
    """
    return bool(text.strip("- ")) and not re.search(r"[{\n]|:(\s|$)|://", text)


def name_of(path: str | Path) -> str | None:
    """The name of a file, if it comes with the package and nothing in the working directory has that name."""
    file = Path(path)
    name = file.relative_to(FOLDER).with_suffix("").as_posix() if file.is_relative_to(FOLDER) else ""
    return name if name and Path(find(name)) == file else None


def nearest(text: str) -> str:
    """What to do about a text that is no name."""
    known, word = names(), os.path.normpath(text).replace(os.sep, "/").removesuffix(".yaml")
    last = {name.rpartition("/")[2]: name for name in known}
    close = [*get_close_matches(word, known, n=3), *(last[w] for w in get_close_matches(Path(word).name, last, n=3))]
    if len(word) > 2:
        close += [name for name in known if word in name]
    close = list(dict.fromkeys(close))[:3]
    meant = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{meant}'lit-ppo ls' lists the names"


def comment(name: str) -> str:
    """The first sentence of the comment at the top of a file."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    text = " ".join(line.removeprefix("#").strip() for line in _leading(lines))
    return re.split(r"(?<=[^ .]\.)\s+(?=[A-Z])", text)[0].rstrip(".")


def _leading(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("#") or line.startswith("#  "):  # the latter is a command
            return
        yield line


def is_job(name: str) -> bool:
    """Whether a configuration can be run by itself, unlike those that are applied on top of a job."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    return "class_path: Lit" in text or (kind(name) == "" and "\nbase: " in text)


def copy(name: str, target: Path, *, force: bool) -> Path:
    """Copy a configuration.

    Args:
        name: Its name, or the path of a file.
        target: File, or a folder for it; without a suffix ``.yaml`` is added.
        force: Replace an existing file.

    Raises:
        CommandError: There is no such name, or the target exists or cannot be written.
    """
    source = path_of(name)
    if source is None:
        raise CommandError(f"cp {name}: no configuration of that name; {nearest(name)}", exit_code=2)
    file = target / source.name if target.is_dir() else target if target.suffix else target.with_suffix(".yaml")
    if file.exists() and not force:
        raise CommandError(f"cp {name}: {file} exists; give another file, or --force to replace it", exit_code=2)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.read_bytes())
    except OSError as error:
        raise CommandError(f"cp {name}: {file} cannot be written ({error.strerror}); give another file") from error
    return file
