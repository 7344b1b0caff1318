"""Configuration files in layers: ``base: ppo.yaml`` at the top of a file applies that file first."""

import os
from pathlib import Path
from typing import NoReturn

import yaml

from lit_ppo.run.errors import CommandError


def layers(file: str) -> list[str]:
    """The files that a configuration file stands for: the lowest base first, the file itself last."""
    files = [file]
    while (base := _base(files[0])) is not None:
        if base in files:
            _refuse(files[0], f"{base} is based on this file; remove one of the two")
        if not os.path.isfile(base):
            _refuse(files[0], f"file {base} does not exist; give a path relative to this file")
        files.insert(0, base)
    return files


def _base(file: str) -> str | None:
    if not os.path.isfile(file):
        return None  # a URL or YAML text, or missing: the parser reads it or reports it
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None  # the parser reports it
    base = content.get("base") if isinstance(content, dict) else None
    return None if base is None else os.path.normpath(Path(file).parent / str(base))


def _refuse(file: str, problem: str) -> NoReturn:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    number = next((number for number, line in enumerate(lines, 1) if line.startswith("base")), 1)
    raise CommandError(f"{file}:{number}: base: {problem}", exit_code=2)
