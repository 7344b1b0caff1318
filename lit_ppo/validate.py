"""Checks of constructor arguments. Each returns the value, or raises with class, argument, value and what is allowed.

``owner`` is the object whose argument is checked, or the name of its class.

>>> integer("LitPPO", "ppo_epochs", 0)
Traceback (most recent call last):
ValueError: LitPPO(ppo_epochs=0): must be an integer, at least 1
"""

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any, NoReturn


def refuse(owner: object, name: str, value: object, problem: str) -> NoReturn:
    """Raise the error of an argument.

    Args:
        owner: See above.
        name: Argument.
        value: What was given.
        problem: What is wrong and what to do.

    Raises:
        ValueError: Always.
    """
    class_name = owner if isinstance(owner, str) else type(owner).__name__
    raise ValueError(f"{class_name}({name}={value!r}): {problem}")


def integer(owner: object, name: str, value: Any, *, at_least: int = 1) -> int:
    """An integer from ``at_least`` on; booleans are refused."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        refuse(owner, name, value, f"must be an integer, at least {at_least}")
    return value


def number(
    owner: object, name: str, value: Any, *, above: float | None = None, at_least: float | None = None,
    below: float | None = None,
) -> float:  # fmt: skip
    """A finite number within bounds; booleans are refused."""
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    bounds = [
        f"{words} {bound:g}"
        for words, bound in (("above", above), ("at least", at_least), ("below", below))
        if bound is not None
    ]
    if (
        not valid
        or (above is not None and value <= above)
        or (at_least is not None and value < at_least)
        or (below is not None and value >= below)
    ):
        refuse(owner, name, value, " and ".join(["must be a finite number", *bounds]).replace(" and", ",", 1))
    return value  # type: ignore[no-any-return]


def positive(owner: object, name: str, value: Any) -> float:
    """A finite number above 0."""
    return number(owner, name, value, above=0)


def positive_or_none(owner: object, name: str, value: Any) -> float | None:
    """A finite number above 0, or None."""
    return None if value is None else positive(owner, name, value)


def non_negative(owner: object, name: str, value: Any) -> float:
    """A finite number, 0 or above."""
    return number(owner, name, value, at_least=0)


def non_negative_or_none(owner: object, name: str, value: Any) -> float | None:
    """A finite number, 0 or above, or None."""
    return None if value is None else non_negative(owner, name, value)


def fraction(owner: object, name: str, value: Any) -> float:
    """A number above 0 and below 1."""
    return number(owner, name, value, above=0, below=1)


def fraction_or_none(owner: object, name: str, value: Any) -> float | None:
    """A number above 0 and below 1, or None."""
    return None if value is None else fraction(owner, name, value)


def boolean(owner: object, name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        refuse(owner, name, value, "must be True or False")
    return value


def one_of(owner: object, name: str, value: Any, choices: Sequence[str]) -> Any:
    """One of the choices."""
    if value not in choices:
        refuse(owner, name, value, f"must be one of {', '.join(map(repr, choices))}")
    return value


def ascending(
    owner: object, name: str, value: Any, *, above: float | None = None, equal: bool = False
) -> tuple[float, float]:
    """Two finite numbers in ascending order.

    Args:
        owner: See above.
        name: Argument.
        value: What was given.
        above: Lower bound, excluded.
        equal: Accept two equal numbers.
    """
    numbers = tuple(value) if isinstance(value, list | tuple) else ()
    finite = [x for x in numbers if isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)]
    valid = len(numbers) == len(finite) == 2 and (above is None or above < finite[0])
    if not valid or finite[0] > finite[1] or (finite[0] == finite[1] and not equal):
        bound = "" if above is None else f", above {above:g}"
        refuse(owner, name, value, f"must be two finite numbers in ascending order{bound}")
    return finite[0], finite[1]


def path_or_name(owner: object, name: str, value: Any) -> str:
    """Where a model or tokenizer is saved, rather than the object itself."""
    if isinstance(value, str | PathLike):
        return str(value)
    class_name = owner if isinstance(owner, str) else type(owner).__name__
    raise ValueError(
        f"{class_name}({name}={type(value).__name__}): give a path or hub name, since copies, shards and resumed runs "
        f"load it again: save it by {name}.save_pretrained('folder'), a model's tokenizer too, and give {name}='folder'"
    )


def exactly_one(owner: object, **arguments: Any) -> None:
    """Check that one argument was given and the others are None."""
    if sum(value is not None for value in arguments.values()) != 1:
        _refuse_together(owner, arguments, "give exactly one of")


def at_most_one(owner: object, **arguments: Any) -> None:
    """Check that all arguments except one are None."""
    if sum(value is not None for value in arguments.values()) > 1:
        _refuse_together(owner, arguments, "give at most one of")


def all_or_none(owner: object, **arguments: Any) -> None:
    """Check that all arguments were given, or that all are None."""
    if len({value is None for value in arguments.values()}) > 1:
        _refuse_together(owner, arguments, "give all or none of")


def _refuse_together(owner: object, arguments: dict[str, Any], problem: str) -> NoReturn:
    class_name = owner if isinstance(owner, str) else type(owner).__name__
    shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    raise ValueError(f"{class_name}({shown}): {problem} {' and '.join(arguments)}")
