"""Argument checks: what each accepts, what it refuses, and the words of the refusal."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from lit_ppo import validate


class Trick:
    """Stands for the owner of an argument."""


ACCEPTED: list[tuple[Callable[..., Any], dict[str, Any], list[Any]]] = [
    (validate.integer, {}, [1, 7]),
    (validate.integer, {"at_least": 0}, [0]),
    (validate.number, {}, [-3.5, 0]),
    (validate.number, {"above": 1, "below": 2}, [1.5]),
    (validate.number, {"at_least": 1, "below": 2}, [1, 1.999]),
    (validate.positive, {}, [1e-9, 3]),
    (validate.positive_or_none, {}, [None, 0.5]),
    (validate.non_negative, {}, [0, 0.0, 2.5]),
    (validate.non_negative_or_none, {}, [None, 0, 1.5]),
    (validate.fraction, {}, [0.01, 0.99]),
    (validate.fraction_or_none, {}, [None, 0.5]),
    (validate.ascending, {}, [(-1, 2.5)]),
    (validate.ascending, {"above": 1, "equal": True}, [(1.5, 1.5)]),
    (validate.boolean, {}, [True, False]),
    (validate.one_of, {"choices": ("a", "b")}, ["a", "b"]),
]
REFUSED: list[tuple[Callable[..., Any], dict[str, Any], list[Any], str]] = [
    (validate.integer, {}, [0, -1, 1.0, True, None, "1"], "must be an integer, at least 1"),
    (validate.integer, {"at_least": 2}, [1, True], "must be an integer, at least 2"),
    (validate.number, {}, [math.nan, math.inf, -math.inf, False, None, "1"], "must be a finite number"),
    (validate.number, {"above": 1, "below": 2}, [1, 2], "must be a finite number, above 1 and below 2"),
    (validate.number, {"at_least": 1, "below": 2}, [0.9, 2], "must be a finite number, at least 1 and below 2"),
    (validate.positive, {}, [0, -0.5, math.inf, True], "must be a finite number, above 0"),
    (validate.positive_or_none, {}, [0, False], "must be a finite number, above 0"),
    (validate.non_negative, {}, [-0.1, math.nan], "must be a finite number, at least 0"),
    (validate.non_negative_or_none, {}, [-0.1, math.nan], "must be a finite number, at least 0"),
    (validate.fraction, {}, [0, 1, 0.0, 1.0], "must be a finite number, above 0 and below 1"),
    (validate.fraction_or_none, {}, [0, 1], "must be a finite number, above 0 and below 1"),
    (validate.boolean, {}, [0, 1, None, "true"], "must be True or False"),
    (
        validate.ascending,
        {},
        [(1, 1), (2, 1), (1,), (1, 2, 3), (1, math.inf), (True, 2), ("1", 2), 1, None],
        "must be two finite numbers in ascending order",
    ),
    (
        validate.ascending,
        {"above": 1, "equal": True},
        [(1, 2), (3, 2)],
        "must be two finite numbers in ascending order, above 1",
    ),
    (validate.one_of, {"choices": ("a", "b")}, ["c", None, "A"], "must be one of 'a', 'b'"),
]


@pytest.mark.parametrize(("check", "options", "values"), ACCEPTED)
def test_accepted_values_are_returned_as_they_are(
    check: Callable[..., Any], options: dict[str, Any], values: list[Any]
) -> None:
    for value in values:
        returned = check(Trick(), "size", value, **options)
        assert returned is value or (returned == value and type(returned) is type(value))


@pytest.mark.parametrize(("check", "options", "values", "problem"), REFUSED)
def test_refused_values_are_named_with_class_and_argument(
    check: Callable[..., Any], options: dict[str, Any], values: list[Any], problem: str
) -> None:
    for value in values:
        with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
            check(Trick(), "size", value, **options)
        assert str(error.value) == f"Trick(size={value!r}): {problem}"


def test_a_class_name_stands_for_an_object() -> None:
    with pytest.raises(ValueError, match=r"^LitPPO\(kl_coef=-1\): must be a finite number, at least 0$"):
        validate.non_negative("LitPPO", "kl_coef", -1)


@pytest.mark.parametrize(
    ("check", "accepted", "refused", "problem"),
    [
        (validate.exactly_one, [(1, None)], [(None, None), (1, 0.5)], "give exactly one of"),
        (validate.at_most_one, [(1, None), (None, None)], [(1, 0.5)], "give at most one of"),
        (validate.all_or_none, [(1, 0.5), (None, None)], [(1, None), (None, 0.5)], "give all or none of"),
    ],
)
def test_arguments_that_depend_on_each_other(
    check: Callable[..., None], accepted: list[Any], refused: list[Any], problem: str
) -> None:
    for size, share in accepted:
        check(Trick(), size=size, share=share)
    for size, share in refused:
        with pytest.raises(ValueError, match=rf"^Trick\(size={size}, share={share}\): {problem} size and share$"):
            check(Trick(), size=size, share=share)
