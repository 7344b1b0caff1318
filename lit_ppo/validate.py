"""Checks of constructor arguments. Each returns the value, or raises with class, argument, value and what is allowed.

``owner`` is the object whose argument is checked, or the name of its class. Scalars of numpy and torch are accepted
where a number is, and come back as Python's.

>>> integer("LitPPO", "ppo_epochs", 0)
Traceback (most recent call last):
ValueError: LitPPO(ppo_epochs=0): must be an integer, at least 1
"""

import math
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

from lit_ppo.shown import written

LARGEST_COUNT = 2**31 - 1
# a float32 holds the square of each, and its inverse
LARGEST, SMALLEST = 1e12, 1e-12


def class_name(owner: object) -> str:
    """The name of the class whose argument is checked."""
    return owner if isinstance(owner, str) else type(owner).__name__


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
    raise ValueError(f"{class_name(owner)}({name}={written(value)}): {problem}")


def needs_package(what: str, *names: str, install: str = "") -> None:
    """Check that packages are installed which only a part of lit_ppo needs.

    Args:
        what: That part.
        *names: Of the packages, as they are imported.
        install: For pip; by default the names.

    Raises:
        ImportError: Names the first that is missing.

    >>> needs_package("LitPPO.attach", "no_such_package")
    Traceback (most recent call last):
    ImportError: LitPPO.attach: needs no_such_package; pip install no_such_package
    """
    for name in names:
        try:
            missing = find_spec(name) is None
        except ImportError:
            missing = True
        if missing:
            raise ImportError(f"{what}: needs {name}; pip install {install or ' '.join(names)}")


def plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's number; anything else as it is."""
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        try:
            scalar = value.item()
        except Exception:  # a tensor without data
            return value
        return scalar if isinstance(scalar, bool | int | float | complex | str) else value
    return value


def integer(owner: object, name: str, value: Any, *, at_least: int = 1, at_most: int = LARGEST_COUNT) -> int:
    """An integer from ``at_least`` to ``at_most``; booleans are refused."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        refuse(owner, name, value, f"must be an integer, at least {at_least}")
    if value > at_most:
        refuse(owner, name, value, f"must be an integer, at least {at_least} and at most {at_most}")
    return value


def integer_or_none(owner: object, name: str, value: Any, **bounds: int) -> int | None:
    """An integer, or None."""
    return None if value is None else integer(owner, name, value, **bounds)


def seed_number(owner: object, name: str, value: Any) -> int:
    """A seed that numpy and torch take."""
    return integer(owner, name, value, at_least=0, at_most=2**63 - 1)


def samples(owner: object, name: str, value: Any, *, at_least: int = 1) -> int:
    """A number of samples of a prompt, or of prompts of one rollout."""
    return integer(owner, name, value, at_least=at_least, at_most=2**16)


def number(
    owner: object, name: str, value: Any, *, above: float | None = None, at_least: float | None = None,
    below: float | None = None, at_most: float | None = None,
) -> float:  # fmt: skip
    """A finite number within bounds, and neither so large nor so small that float32 cannot hold it squared."""
    value = plain(value)
    valid = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    if (
        not valid
        or (above is not None and value <= above)
        or (at_least is not None and value < at_least)
        or (below is not None and value >= below)
        or (at_most is not None and value > at_most)
    ):
        bounds = (("above", above), ("at least", at_least), ("below", below), ("at most", at_most))
        allowed = ["must be a finite number", *(f"{words} {bound:g}" for words, bound in bounds if bound is not None)]
        refuse(owner, name, value, " and ".join(allowed).replace(" and", ",", 1))
    if abs(value) > LARGEST or 0 < abs(value) < SMALLEST:
        size = "large" if abs(value) > 1 else "small"
        refuse(owner, name, value, f"too {size} to compute with; give one between {SMALLEST:g} and {LARGEST:g} in size")
    return value  # type: ignore[no-any-return]


def number_or_none(owner: object, name: str, value: Any, **bounds: float) -> float | None:
    """A finite number, or None."""
    return None if value is None else number(owner, name, value, **bounds)


def seconds_or_none(owner: object, name: str, value: Any) -> float | None:
    """A time limit that a timer takes, or None."""
    return number_or_none(owner, name, value, above=0, at_most=1e6)


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
    value = plain(value)
    if not isinstance(value, bool):
        refuse(owner, name, value, "must be True or False")
    return value


def one_of(owner: object, name: str, value: Any, choices: Sequence[str]) -> Any:
    """One of the choices."""
    if not isinstance(value, str) or value not in choices:
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
    numbers = tuple(map(plain, value)) if isinstance(value, list | tuple) else ()
    finite = [x for x in numbers if isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < math.inf]
    valid = len(numbers) == len(finite) == 2 and (above is None or above < finite[0])
    if not valid or finite[0] > finite[1] or (finite[0] == finite[1] and not equal):
        bound = "" if above is None else f", above {above:g}"
        refuse(owner, name, value, f"must be two finite numbers in ascending order{bound}")
    return number(owner, name, finite[0]), number(owner, name, finite[1])


def text(owner: object, name: str, value: Any) -> str:
    """A string that is not empty, such as the name of a column."""
    if not isinstance(value, str) or not value.strip():
        refuse(owner, name, value, "must be a string that is not empty")
    return value


def text_or_none(owner: object, name: str, value: Any) -> str | None:
    """A string that is not empty, or None."""
    return None if value is None else text(owner, name, value)


def checked_names(owner: object, name: str, value: Any) -> list[str]:
    """A list of strings, at least one, of which none is empty and none comes twice."""
    names = list(value) if isinstance(value, list | tuple) else []
    valid = all(isinstance(entry, str) and entry.strip() for entry in names)
    if not names or not valid or len(set(names)) < len(names):
        refuse(owner, name, value, "must be a list of names, all different and none of them empty")
    return names


def path(owner: object, name: str, value: Any) -> str:
    """A path, or the name of something on the hub, as a string."""
    try:
        found = str(os.fspath(value)) if isinstance(value, str | os.PathLike) else ""
        valid = bool(found.strip()) and len(os.fsencode(found)) <= 4096 and "\0" not in found
    except Exception:  # no path; or characters that no file name has
        valid = False
    if not valid:
        refuse(owner, name, value, "must be a path or a name: a string that is not empty, or a pathlib.Path")
    return found


def path_or_none(owner: object, name: str, value: Any) -> str | None:
    """A path, or None."""
    return None if value is None else path(owner, name, value)


def path_or_name(owner: object, name: str, value: Any) -> str:
    """Where a model or tokenizer is saved, rather than the object itself."""
    if hasattr(value, "save_pretrained"):
        raise ValueError(
            f"{class_name(owner)}({name}={type(value).__name__}): give a path or hub name, since copies, shards and "
            f"resumed runs load it again: save it by {name}.save_pretrained('folder'), a model's tokenizer too, and "
            f"give {name}='folder'"
        )
    return path(owner, name, value)


def mapping(owner: object, name: str, value: Any) -> dict[str, Any]:
    """Named values as a dict; None is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
        refuse(owner, name, value, "must be a dict whose keys are names")
    return dict(value)


def factory(owner: object, name: str, value: Any, what: str) -> Any:
    """A function that makes an optimizer or a schedule later.

    Args:
        owner: See above.
        name: Argument.
        value: What was given.
        what: An example, for the message.
    """
    if not callable(value):
        refuse(owner, name, value, f"must be a function that makes it, such as {what}")
    return value


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
    given = ", ".join(f"{name}={written(value)}" for name, value in arguments.items())
    raise ValueError(f"{class_name(owner)}({given}): {problem} {' and '.join(arguments)}")
