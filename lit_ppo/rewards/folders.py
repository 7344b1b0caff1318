"""The folders that a module reads its models from, which no export may write."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_ppo.rewards import reward_models


def folders_in(settings: Any, name: str = "model") -> dict[str, str]:
    """Folders that a configuration names, by the name of the setting."""
    return dict(_folders(settings, name))


def folders_of(module: Any) -> dict[str, str]:
    """Folders that a module reads its models from, by the name of the argument."""
    parts = [getattr(module, name, None) for name in ("model_settings", "source")]
    parts += reward_models(getattr(module, "rewards", None)) + reward_models(getattr(module, "eval_rewards", None))
    return folders_in([vars(part) for part in parts if part is not None], type(module).__name__)


def check_not_read(where: str, folder: str | Path, used: dict[str, str]) -> None:
    """Refuse to write a model into a file, or into a folder that is read.

    Args:
        where: Class, function or option, with argument and value, for messages.
        folder: To write to.
        used: From :func:`folders_in` or :func:`folders_of`.

    Raises:
        ValueError: It is one of these folders, or a file.
    """
    for setting, path in used.items():
        if os.path.exists(folder) and os.path.samefile(folder, path):
            raise ValueError(f"{where}: the run reads this folder ({setting}); name another one")
    if os.path.isfile(folder):
        raise ValueError(f"{where}: is a file; name a folder")


def _folders(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and value and os.path.isdir(value):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _folders(item, name if key == "init_args" else f"{name}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _folders(item, name)
