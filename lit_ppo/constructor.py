"""Constructors that refuse wrong names of arguments in the words of wrong values."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar, cast

from lit_ppo.shown import written
from lit_ppo.validate import plain

F = TypeVar("F", bound=Callable[..., Any])

_running: ContextVar[tuple[tuple[object, dict[str, Any]], ...]] = ContextVar("_running", default=())


def constructor(init: F) -> F:
    """Decorate a constructor: wrong names are refused as wrong values are; numpy's and torch's scalars become Python's.

    >>> class Trick:
    ...     @constructor
    ...     def __init__(self, every: int = 1) -> None: ...
    >>> Trick(evry=2)
    Traceback (most recent call last):
    TypeError: Trick(evry=2): there is no such argument; did you mean every?
    """
    signature = inspect.signature(init)
    parameters = list(signature.parameters.values())[1:]

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()})
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}({_misnamed(parameters, args, kwargs)}") from error
        token = _running.set((*_running.get(), (self, _by_name(bound))))
        try:
            init(*bound.args, **bound.kwargs)
        finally:
            _running.reset(token)

    return cast(F, checked)


def arguments_of(instance: object) -> dict[str, Any]:
    """The arguments of those constructors of an object that run now, by name, defaults included.

    >>> class Trick:
    ...     @constructor
    ...     def __init__(self, every: int = 1, **others: int) -> None:
    ...         print(arguments_of(self))
    >>> _ = Trick(offset=3)
    {'every': 1, 'offset': 3}
    """
    found: dict[str, Any] = {}
    for one, arguments in _running.get():  # those of a subclass come first
        if one is instance:
            found |= arguments
    return found


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Arguments without the object itself; those of ``**kwargs`` by their own names."""
    found: dict[str, Any] = {}
    for parameter in list(bound.signature.parameters.values())[1:]:
        value = bound.arguments.get(parameter.name, parameter.default)
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= bound.arguments.get(parameter.name, {})
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            found[parameter.name] = value
    return found


def _misnamed(parameters: list[inspect.Parameter], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What is wrong with the names or the number of arguments."""
    names = [p.name for p in parameters]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    for name, value in kwargs.items():
        if name not in names:
            near = ", ".join(get_close_matches(name[:80], names, n=1))
            advice = f"did you mean {near}?" if near else f"there are {', '.join(names) or 'none'}"
            return f"{name[:80]}={written(value)}): there is no such argument; {advice}"
        if name in positional[: len(args)]:
            return f"{name}={written(value)}): is given twice, by position too; leave one of them out"
    if len(args) > len(positional):
        problem = f"only {len(positional)} can be given by position; name the others"
        return f"{', '.join(map(written, args[:3]))}, ...): {problem}: {', '.join(names) or 'there are none'}"
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in (*kwargs, *positional[: len(args)])]
    return f"{missing[0]}=...): is missing and has no default; give it"
