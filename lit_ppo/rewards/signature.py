"""Find a reward function, and read what it takes."""

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from lit_ppo.rewards.arrays import NOT_ASYNC
from lit_ppo.shown import written

FUNCTION = "expected is a function (prompts, responses, **columns) that returns one number a response"
WHERE_MODULES_ARE = "modules are looked for in the working directory and among the installed packages"
TEXTS = ("prompts", "responses", "completions")  # arguments that are not columns; the last two are the same


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
            f"RewardFunction(function={written(path)}): no module named {error.name!r}; {WHERE_MODULES_ARE}"
        ) from error
    if not hasattr(module, name):
        close = get_close_matches(name, dir(module), n=1)
        advice = f"did you mean {close[0]!r}?" if close else "give the name of a function in it"
        raise ValueError(f"RewardFunction(function={written(path)}): module {module_path!r} has no {name!r}; {advice}")
    function: Callable[..., Any] = getattr(module, name)
    return function


def check_plain(where: str, function: Any) -> None:
    """Check that something is a function.

    Args:
        where: For the message.
        function: What was given or found.

    Raises:
        TypeError: It is not, or returns something to await.
    """
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{where}: {'is a class' if callable(function) else 'is not callable'}; {FUNCTION}")
    parts = function, type(function).__call__  # of an instance
    if any(inspect.iscoroutinefunction(part) or inspect.isasyncgenfunction(part) for part in parts):
        raise TypeError(f"{where}: is async, and {NOT_ASYNC}")


def texts_of(names: Sequence[str], *, takes_all: bool) -> list[str]:
    """Names under which a function may expect a text of the run, and no column.

    Args:
        names: Of its arguments.
        takes_all: Whether it has ``**``.

    >>> texts_of(["responses", "answer"], takes_all=False), texts_of(["responses", "answer"], takes_all=True)
    (['responses'], ['prompts', 'responses'])
    >>> texts_of([], takes_all=True)
    ['prompts', 'responses', 'completions']
    """
    named = [name for name in TEXTS if name in names]
    if not takes_all:
        return named
    return [*TEXTS] if named in ([], ["prompts"]) else list(dict.fromkeys(["prompts", *named]))


def hidden_column(who: str, name: str, names: Sequence[str], columns: Sequence[str]) -> TypeError:
    """The error of a column with the name of a text, which the function would get in its place.

    Args:
        who: The function.
        name: Of the column.
        names: Of the function's arguments.
        columns: Names of all columns.
    """
    _, *responses = TEXTS
    free = [other for other in responses if name in responses and other not in (*names, *columns)]
    instead = f", or the argument to {free[0]!r}" if free and name in names else ""
    text = "responses" if name in responses else name
    return TypeError(
        f"{who}: the data have a column {name!r}, but for a reward this name means the run's own {text}; rename the "
        f"column{instead}"
    )
