"""Find a reward function, and read what it takes."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from lit_ppo.shown import written


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The function's parameters; a builtin that tells none is taken to want prompts and responses."""
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:
        return [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("prompts", "responses")]


def takes_experience(source: Callable[..., Any]) -> bool:
    """Whether a callable is a score source itself: its one required argument is named ``experience``."""
    return [p.name for p in parameters(source) if p.default is p.empty] == ["experience"]


def imported(path: str | Callable[..., Any]) -> Callable[..., Any]:
    """The object at ``package.module.name``; a function itself."""
    if not isinstance(path, str):
        return path
    module_path, _, name = path.rpartition(".")
    if not module_path or not all(part and part.isprintable() for part in path.split(".")):
        raise ValueError(f"RewardFunction(function={written(path)}): write it as module.function")
    try:
        module = import_module(module_path)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_path + ".").startswith(error.name + "."):
            raise  # the module is there, what it imports is not
        raise ValueError(
            f"RewardFunction(function={written(path)}): no module named {error.name!r}; "
            "modules are looked for in the working directory and among the installed packages"
        ) from error
    if not hasattr(module, name):
        raise ValueError(f"RewardFunction(function={written(path)}): module {module_path!r} has no {name!r}")
    function: Callable[..., Any] = getattr(module, name)
    return function
