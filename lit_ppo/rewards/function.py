"""Rewards that are Python functions, and the check of every source's scores."""

import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RewardFunction:
    """Scores with any Python function ``(prompts, responses, **columns) -> sequence of float``.

    Every argument is matched by name: ``prompts`` (chat prompts as lists of messages), ``responses`` or
    ``completions`` (the same texts), a column of the data set, or one of ``kwargs``. A function with ``**`` gets all
    columns.

    Args:
        function: The function, or its import path (``package.module.function``).
        kwargs: Further arguments with the same value at every call.

    >>> from types import SimpleNamespace
    >>> shout = RewardFunction(lambda responses: [float(text.isupper()) for text in responses])
    >>> shout(SimpleNamespace(prompts=["a", "b"], responses=["YES", "no"], columns={}))
    [1.0, 0.0]
    """

    def __init__(self, function: str | Callable[..., Any], kwargs: dict[str, Any] | None = None) -> None:
        self.function = _imported(function) if isinstance(function, str) else function
        if not callable(self.function):
            raise TypeError(f"RewardFunction(function={function!r}): is not callable; {_EXPECTED}")
        self.name = function if isinstance(function, str) else _name(function)
        self.kwargs = dict(kwargs or {})
        self._read_signature()

    def _read_signature(self) -> None:
        """Read from the signature how to call the function; refuse one that cannot be called."""
        parameters = _parameters(self.function)
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._positional = [p for p in named if p.kind is p.POSITIONAL_ONLY]
        self._names = [p.name for p in named]
        self._required = [p.name for p in named if p.default is p.empty]
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if not self._takes_all and set(_TEXTS).isdisjoint(self._names):
            takes = ", ".join(map(str, parameters)) or "nothing"
            raise TypeError(
                f"RewardFunction({self.name}): takes neither prompts nor responses (or completions), but {takes}, and "
                f"arguments are matched by name; {_EXPECTED}"
            )
        self._response_names = [name for name in _TEXTS[1:] if name in self._names] or ["responses"]
        unknown = sorted(name for name in self.kwargs if name in _TEXTS or not self._accepts(name))
        if unknown:
            raise ValueError(
                f"RewardFunction(kwargs={self.kwargs!r}): {self.name} takes no argument {', '.join(unknown)}; "
                f"its arguments are {', '.join(p.name for p in parameters)}"
            )

    def _accepts(self, name: str) -> bool:
        return name in self._names or self._takes_all

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check that every required argument is a text, a column or one of ``kwargs``.

        Args:
            columns: Names of the columns of the data.

        Raises:
            TypeError: One is not; names it and what there is.
        """
        offered = [*_TEXTS, *self.kwargs, *columns]
        missing = [name for name in self._required if name not in offered]
        if missing:
            there = ["prompts", "responses (or completions)", *columns]
            raise TypeError(f"RewardFunction({self.name}): needs {', '.join(missing)}; there are {', '.join(there)}")

    def __str__(self) -> str:
        return f"RewardFunction({self.name})"

    def __call__(self, experience: Any) -> Any:
        """What the function returns for these responses; see :func:`check_scores`.

        Raises:
            RuntimeError: The function raised.
            TypeError: It needs a column that is not there.
        """
        self.check_columns(experience.columns)
        prompts = experience.columns.get("messages", experience.prompts)
        responses = dict.fromkeys(self._response_names, experience.responses)
        offered = {**experience.columns, **self.kwargs, "prompts": prompts, **responses}
        passed = {name: value for name, value in offered.items() if self._accepts(name)}
        positional = [passed.pop(p.name, p.default) for p in self._positional]
        try:
            return self.function(*positional, **passed)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise RuntimeError(
                f"RewardFunction({self.name}): raised {type(error).__name__}: {' '.join(str(error).split())} "
                f"({frame.filename}, line {frame.lineno}); {_EXPECTED}"
            ) from error


_EXPECTED = "expected is a function (prompts, responses, **columns) that returns one number a response"
_TEXTS = ("prompts", "responses", "completions")


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The function's parameters; a builtin that tells none is taken to want prompts and responses."""
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:
        return [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("prompts", "responses")]


def takes_experience(source: Callable[..., Any]) -> bool:
    """Whether a callable is a score source itself: its one required argument is named ``experience``."""
    return [p.name for p in _parameters(source) if p.default is p.empty] == ["experience"]


def _imported(path: str) -> Callable[..., Any]:
    """The object at ``package.module.name``."""
    module_path, _, name = path.rpartition(".")
    if not module_path:
        raise ValueError(f"RewardFunction(function={path!r}): write it as module.function")
    try:
        module = import_module(module_path)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_path + ".").startswith(error.name + "."):
            raise  # the module is there, what it imports is not
        raise ValueError(
            f"RewardFunction(function={path!r}): no module named {error.name!r}; "
            "modules are looked for in the working directory and among the installed packages"
        ) from error
    if not hasattr(module, name):
        raise ValueError(f"RewardFunction(function={path!r}): module {module_path!r} has no {name!r}")
    function: Callable[..., Any] = getattr(module, name)
    return function


def source_names(source: Any) -> list[str]:
    """Names of the sources that a weighted sum consists of; empty for any other source."""
    return list(getattr(source, "sources", {}))


def check_columns(columns: Iterable[str], source: Any) -> None:
    """Check that the data have the columns that the reward functions of a source need.

    Args:
        columns: Names of the columns.
        source: A score source, or a weighted sum of several.

    Raises:
        TypeError: One is missing.
    """
    for part in (source, *getattr(source, "sources", {}).values()):
        if isinstance(part, RewardFunction):
            part.check_columns(columns)


def scores_of(source: Any, experience: Any, name: str = "rewards") -> Tensor:
    """Call a score source and check its result, as the only place where results of sources are checked.

    Args:
        source: See :func:`lit_ppo.rewards.as_source`.
        experience: Rows to score.
        name: Shown in an error for a source without a ``__str__`` of its own.

    Raises:
        TypeError: The result is not numbers.
        ValueError: It has a wrong shape, or a value that is not finite.

    Shapes:
        -> (B,), float32.
    """
    shown = str(source) if isinstance(source, RewardFunction) or hasattr(source, "score_texts") else name
    return check_scores(source(experience), len(experience.responses), shown, experience.responses)


def check_scores(scores: Any, count: int, source: str, responses: Sequence[str] | None = None) -> Tensor:
    """The scores as a float32 tensor, if they are one finite number a response.

    Args:
        scores: What the source gave: a tensor, an array or a sequence of numbers.
        count: Number of responses.
        source: Who gave it, for the error.
        responses: Their texts, for the error.

    Raises:
        TypeError: It is not numbers.
        ValueError: Wrong count or shape, or a value that is NaN or infinite (in float32).

    Shapes:
        -> (count,).
    """
    values = scores if isinstance(scores, Tensor) else _as_tensor(scores, source)
    if values.is_complex():
        raise TypeError(f"{source}: returned complex numbers; {_ONE_EACH}")
    if values.shape != (count,):
        got = f"{len(values)} values" if values.ndim == 1 else f"values of shape {tuple(values.shape)}"
        raise ValueError(f"{source}: returned {got} for {count} responses; {_ONE_EACH}, shape ({count},)")
    values = values.detach().to(torch.float32)
    if not values.isfinite().all():
        row = int((~values.isfinite()).nonzero()[0])
        which = "" if responses is None else f", {responses[row][:80]!r}"
        raise ValueError(
            f"{source}: returned {values[row].item()} for response {row} of {count}{which}; {_ONE_EACH}, all finite"
        )
    return values


_ONE_EACH = "expected is a sequence with one number a response"


def _as_tensor(scores: Any, source: str) -> Tensor:
    if isinstance(scores, (str, bytes, Mapping)) or not isinstance(scores, Iterable):
        raise TypeError(f"{source}: returned {type(scores).__name__} {str(scores)[:80]!r}; {_ONE_EACH}")
    if hasattr(scores, "__array__"):
        try:
            return torch.as_tensor(np.asarray(scores))
        except TypeError as error:
            raise TypeError(f"{source}: returned an array that is not numbers ({error}); {_ONE_EACH}") from error
    return torch.tensor([_number(value, row, source) for row, value in enumerate(scores)], dtype=torch.float64)


def _number(value: Any, row: int, source: str) -> float:
    try:
        if isinstance(value, (str, bytes)) or getattr(value, "ndim", 0) > 0:
            raise TypeError  # float() takes both
        return float(value)
    except (TypeError, ValueError):
        shown = f"{type(value).__name__} {str(value)[:80]!r}"
        raise TypeError(f"{source}: returned {shown} for response {row}; {_ONE_EACH}") from None
