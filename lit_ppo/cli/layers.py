"""Configuration files in layers: ``base: ppo.yaml`` at the top of a file applies that file first."""

import os
from pathlib import Path

import yaml

from lit_ppo.run.errors import CommandError


def layers(file: str) -> list[str]:
    """The files that a configuration file stands for: the lowest base first, the file itself last."""
    files = [file]
    while (base := _base(files[0])) is not None:
        if base in files:
            raise CommandError(f"{files[0]}: base: {base} is based on this file; remove one of the two", exit_code=2)
        if not os.path.isfile(base):
            raise CommandError(
                f"{files[0]}: base: file {base} does not exist; give a path relative to this file", exit_code=2
            )
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
