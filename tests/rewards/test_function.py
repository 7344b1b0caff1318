"""Reward functions: what they are passed, and what they may return."""

import copy
import itertools
import math
import os
import re
import signal
import threading
import warnings
from array import array
from asyncio import CancelledError
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lit_ppo.rewards import RewardFunction, WeightedRewards, scores_of
from tests.helpers.rewards import TWO, experience, lengths


def quietly(make: Callable[[], Any]) -> Any:
    """What PyTorch warns about, but people may still have."""
    with warnings.catch_warnings(action="ignore"):
        return make()


class Unprintable(Exception):
    """Its text cannot be made."""

    def __str__(self) -> str:
        raise LookupError

    __repr__ = __str__


@pytest.mark.parametrize(
    "function",
    [
        "tests.helpers.rewards.lengths",
        lengths,
        partial(lengths),
        lambda responses, prompts: lengths(prompts, responses),
        lambda completions, prompts, **columns: lengths(prompts, completions) if "responses" not in columns else [],
        lambda prompts, responses, weight=1, answer=None, /: lengths(prompts, responses) if weight == 1 else [],
        lambda *args, **kwargs: lengths(*args, **{name: kwargs[name] for name in ("prompts", "responses")}),
        lambda *, responses, prompts: lengths(prompts, responses),
        lambda **columns: lengths(columns["prompts"], columns["responses"]),
        lambda answer, responses, **others: [31.0, 2.0] if others.keys() == {"prompts", "year"} else [],
        lambda prompts, responses, answer: lengths(prompts, responses) if answer == ["x", "y"] else [],
        lambda prompts, responses, unknown=None: lengths(prompts, responses) if unknown is None else [],
    ],
)
def test_passes_what_the_signature_accepts(function: Any):
    rows = experience(**TWO, answer=["x", "y"], year=[1, 2])
    assert scores_of(RewardFunction(function), rows).tolist() == [31.0, 2.0]


def test_kwargs_have_the_same_value_at_every_call():
    def function(responses, scale, offset=0.0):
        return [scale * len(response) + offset for response in responses]

    rows = experience(**TWO, scale=[9, 9])  # a column of that name does not win
    assert scores_of(RewardFunction(function, {"scale": 2.0}), rows).tolist() == [6.0, 0.0]
    assert scores_of(RewardFunction(function, {"scale": 2.0, "offset": 1.0}), rows).tolist() == [7.0, 1.0]


@pytest.mark.parametrize("kwargs", [{"scle": 2.0}, {"prompts": []}])
def test_kwargs_that_the_function_does_not_take(kwargs: dict[str, Any]):
    message = r"RewardFunction\(kwargs=.*lengths takes no argument .*; its arguments are prom"
    with pytest.raises(ValueError, match=message):
        RewardFunction(lengths, kwargs)


def test_chat_prompts_arrive_as_messages():
    seen, messages = [], [[{"role": "user", "content": "a"}], [{"role": "user", "content": "bb"}]]
    function = lambda prompts, responses: seen.append(prompts) or [0, 0]  # noqa: E731
    scores_of(RewardFunction(function), experience(**TWO, messages=messages))
    assert seen == [messages]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5],
        (1, 2.5),
        (x for x in [1, 2.5]),
        np.array([1, 2.5]),
        torch.tensor([1, 2.5], dtype=torch.float64),
        torch.tensor([1, 2.5], requires_grad=True),
        [torch.tensor(1), np.float32(2.5)],
        [True, 2.5],
        np.array([1, 2.5], dtype=object),
        np.array([2.5, 1])[::-1],
        np.array([1, 2.5], dtype=">f8"),
        np.array([1, 2.5], dtype=np.longdouble),
        np.ma.masked_array([1, 2.5], mask=[False, False]),
        [Decimal(1), Fraction(5, 2)],
        array("d", [1, 2.5]),
        {"a": 1, "b": 2.5}.values(),
        pa.array([1, 2.5]),
        pa.chunked_array([[1.0], [2.5]]),
        torch.tensor([1, 2.5]).to_sparse(),
        quietly(lambda: torch.quantize_per_tensor(torch.tensor([1, 2.5]), 0.5, 0, torch.qint8)),
    ],
)
def test_any_sequence_of_numbers_will_do(returned: Any):
    scores = scores_of(RewardFunction(lambda prompts, responses: returned), experience(**TWO))
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert scores.tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    ("returned", "error", "says"),
    [
        ([1.0], ValueError, r"returned 1 values for 2 responses"),
        ([1.0, 2.0, 3.0], ValueError, r"returned 3 values for 2 responses"),
        (torch.ones(2, 1), ValueError, r"returned values of shape \(2, 1\) for 2 responses"),
        (torch.tensor(1.0), ValueError, r"returned values of shape \(\) for 2 responses"),
        ([1.0, math.nan], ValueError, r"returned nan for response 1 of 2, ''"),
        ([math.inf, 1.0], ValueError, r"returned inf for response 0 of 2, 'ccc'"),
        (torch.tensor([1.0, -math.inf]), ValueError, r"returned -inf for response 1 of 2"),
        ([1e300, 1.0], ValueError, r"returned inf for response 0 of 2"),
        (["1.0", "2.0"], TypeError, r"returned str '1\.0' for response 0"),
        ([[1.0], [2.0]], TypeError, r"returned list '\[1\.0\]' for response 0"),
        ([torch.ones(1), torch.ones(1)], TypeError, r"returned Tensor 'tensor\(\[1\.\]\)' for response 0"),
        (np.array(["a", "b"]), TypeError, r"returned an array that is not numbers"),
        (torch.ones(2, dtype=torch.complex64), TypeError, r"returned complex numbers"),
        ("12", TypeError, r"returned str '12'"),
        (b"12", TypeError, r"returned bytes"),
        ([b"1", b"2"], TypeError, r"returned bytes .* for response 0"),
        ({"a": 1.0, "b": 2.0}, TypeError, r"returned dict"),
        (None, TypeError, r"returned NoneType 'None'"),
        (1.0, TypeError, r"returned float '1\.0'"),
        ({1.0, 2.0}, TypeError, r"returned set .*, which has no order"),
        (bytearray(b"12"), TypeError, r"returned bytearray"),
        (itertools.repeat(1.0), ValueError, r"returned more than 2 values for 2 responses"),
        (torch.ones(2, device="meta"), TypeError, r"returned a tensor on the meta device"),
        (
            quietly(lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])),
            TypeError,
            r"returned a nested tensor",
        ),
        (torch.eye(2).to_sparse(), ValueError, r"returned values of shape \(2, 2\)"),
        (np.ma.masked_array([1, 2], mask=[False, True]), ValueError, r"returned a masked value for response 1"),
        ([1.0, np.ma.masked], TypeError, r"returned MaskedConstant '--' for response 1"),
        (np.array([1, None], dtype=object), TypeError, r"returned NoneType 'None' for response 1"),
        (np.array([1, 2], dtype="M8[s]"), TypeError, r"returned an array that is not numbers"),
        ([1.0, np.timedelta64(1)], TypeError, r"returned timedelta64 .* for response 1"),
        (pa.array([1, None]), ValueError, r"returned nan for response 1"),
        (pa.array(["1", "2"]), TypeError, r"returned str '1' for response 0"),
        ([1.0, np.complex64(2)], TypeError, r"returned complex64 .* for response 1"),
        ([1.0, torch.tensor(2j)], TypeError, r"returned Tensor .* for response 1"),
        ([10**400, 1.0], TypeError, r"returned int '10+\.\.\.' for response 0"),
        ([1.0, 10**5000], TypeError, r"returned int '<int whose text cannot be made: ValueError>' for response 1"),
        ([Unprintable(), 1.0], TypeError, r"returned Unprintable '<Unprintable whose text .*' for response 0"),
    ],
)
def test_bad_returns_name_function_value_and_what_is_expected(returned: Any, error: type[Exception], says: str):
    def my_reward(prompts, responses):
        return returned

    with pytest.raises(error, match=rf"^RewardFunction\(.*my_reward\): {says}.*; expected is .* one number a response"):
        scores_of(RewardFunction(my_reward), experience(**TWO))


def test_function_that_raises_is_named_with_its_line():
    def my_reward(prompts, responses):
        raise LookupError("two\nlines")

    line = my_reward.__code__.co_firstlineno + 1
    with pytest.raises(RuntimeError) as error:
        scores_of(RewardFunction(my_reward), experience(**TWO))
    message = str(error.value)
    assert re.match(r"RewardFunction\(.*my_reward\): raised LookupError: two lines .*; expected is", message)
    assert f"{os.path.basename(__file__)}, line {line})" in message
    assert "\n" not in message
    assert isinstance(error.value.__cause__, LookupError)


@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit(), KeyboardInterrupt(), CancelledError()])
@pytest.mark.parametrize("shape", ["function", "generator", "source"])
def test_any_exception_of_its_own_is_an_error_that_names_the_reward(error: BaseException, shape: str):
    def raises(experience=None):
        raise error

    function = {
        "function": RewardFunction(lambda responses: raises()),
        "generator": RewardFunction(lambda responses: map(raises, responses)),
        "source": raises,
    }[shape]
    words = rf"(lambda.*|rewards): raised {type(error).__name__}\b.*{os.path.basename(__file__)}, line \d+\)"
    with pytest.raises(RuntimeError, match=words):
        scores_of(function, experience(**TWO))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_a_signal_raises_goes_through(error: type[BaseException]):
    """Ctrl-C, and the second SIGTERM."""

    def stop(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGINT, stop)
    try:
        with pytest.raises(error):
            scores_of(RewardFunction(lambda responses: signal.raise_signal(signal.SIGINT)), experience(**TWO))
        assert signal.getsignal(signal.SIGINT) is stop
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [ValueError("x" * 5_000_000), Unprintable(), SystemExit(Unprintable())])
def test_texts_of_exceptions_are_short(error: BaseException):
    def raises(responses):
        raise error

    with pytest.raises(RuntimeError, match=rf"raised {type(error).__name__}: .*; expected is") as raised:
        scores_of(RewardFunction(raises), experience(**TWO))
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("samples", [1, 2])
def test_a_reward_that_changes_its_arguments_changes_copies(samples: int):
    chat = [{"role": "user", "content": "a"}]
    answers = [["x"], ["y"]] if samples == 1 else [["x"]] * 2  # rows of one prompt hold one object
    rows = experience(**TWO, messages=[chat, chat], answer=answers, opened=[threading.Lock()] * 2)
    kept = copy.deepcopy((rows.prompts, rows.responses, rows.columns["messages"], rows.columns["answer"]))

    def changes(prompts, responses, answer, **columns):
        assert len(columns["opened"]) == 2
        for chat, row in zip(prompts, answer, strict=True):
            chat.append(row.pop())
        responses[:] = ["changed", "both"]
        return [len(response) for response in responses]

    both = WeightedRewards({"first": changes, "second": lengths, "third": lambda experience: changes_rows(experience)})
    scores_of(both, rows)
    assert (rows.prompts, rows.responses, rows.columns["messages"], rows.columns["answer"]) == kept
    assert rows.extras["second"].tolist() == [31.0, 1.0]  # each prompt is one message


def changes_rows(experience):
    experience.responses.clear()
    experience.prompts[0] = experience.columns["answer"][0] = "changed"
    return [0.0, 0.0]


def test_column_that_is_not_there():
    def my_reward(responses, answer):
        return [0.0] * len(responses)

    with pytest.raises(TypeError, match=r"my_reward\): needs answer; there are prompts, .*completions.*, year"):
        scores_of(RewardFunction(my_reward), experience(**TWO, year=[1, 2]))


async def awaited(responses):
    return [0.0] * len(responses)


async def yielded(responses):
    for _ in responses:
        yield 0.0


class Awaited:
    async def __call__(self, responses):
        return await awaited(responses)


@pytest.mark.parametrize("function", [awaited, yielded, Awaited(), Awaited().__call__, partial(awaited)])
def test_async_functions_are_refused_at_once(function: Any):
    with pytest.raises(TypeError, match=r"^RewardFunction\(function=.*\): is async, .* returns asyncio.run"):
        RewardFunction(function)


@pytest.mark.parametrize("function", [awaited, yielded])
def test_what_an_async_function_returned_is_no_scores(function: Any):
    """Without a warning of Python that it was never awaited."""
    with pytest.raises(TypeError, match=r"lambda.*\): returned (coroutine|async_generator) .* returns asyncio.run"):
        scores_of(RewardFunction(lambda responses: function(responses)), experience(**TWO))


COLUMN = "the data have a column '{}', but for a reward this name means the run's own {}; rename the column".format


@pytest.mark.parametrize(
    ("function", "column", "says"),
    [
        (lambda responses: responses, "responses", COLUMN("responses", "responses") + ", or the argument to 'c"),
        (lambda completions: completions, "completions", COLUMN("completions", "responses") + ", or the argument"),
        (lambda responses, completions: completions, "completions", COLUMN("completions", "responses") + "$"),
        (lambda prompts, responses: prompts, "prompts", COLUMN("prompts", "prompts") + "$"),
        (lambda prompts, responses, /: prompts, "prompts", COLUMN("prompts", "prompts") + "$"),
        (lambda responses, **columns: columns["prompts"], "prompts", COLUMN("prompts", "prompts") + "$"),
        (lambda **columns: columns["responses"], "responses", COLUMN("responses", "responses") + "$"),
        (lambda prompts, **columns: columns["completions"], "completions", COLUMN("completions", "responses") + "$"),
    ],
)
def test_column_that_a_text_would_hide_is_refused(function: Any, column: str, says: str):
    """Else a reward that compares responses with the data's own would compare them with themselves."""
    with pytest.raises(TypeError, match=rf"lambda.*\): {says}"):
        scores_of(RewardFunction(function), with_column(column))


@pytest.mark.parametrize(
    ("function", "column"),
    [
        (lambda responses: lengths(["a", "bb"], responses), "prompts"),
        (lambda prompts, responses: lengths(prompts, responses), "completions"),
        (lambda prompts, completions: lengths(prompts, completions), "responses"),
        (lambda completions, **others: [31.0, 2.0] if others["responses"] == ["x", "y"] else [], "responses"),
    ],
)
def test_column_of_such_a_name_is_allowed_where_no_text_hides_it(function: Any, column: str):
    assert scores_of(RewardFunction(function), with_column(column)).tolist() == [31.0, 2.0]


def with_column(name: str) -> Any:
    rows = experience(**TWO)
    rows.columns[name] = ["x", "y"]
    return rows


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        ("lengths", ValueError, "write it as module.function"),
        ("no_such_module.lengths", ValueError, "no module named 'no_such_module'; modules are looked for in the wor"),
        ("tests.no_such_module.lengths", ValueError, "no module named 'tests.no_such_module'"),
        ("tests.helpers.rewards.length", ValueError, "module 'tests.helpers.rewards' has no 'length'"),
        ("tests.helpers.rewards.TWO", TypeError, "is not callable; expected is a function"),
        (3, TypeError, "is not callable; expected is a function"),
    ],
)
def test_function_that_cannot_be_found(function: Any, error: type[Exception], says: str):
    with pytest.raises(error, match=rf"RewardFunction\(function={re.escape(repr(function))}\): {says}"):
        RewardFunction(function)


def test_module_that_cannot_import_something_else_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "needs_more.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        RewardFunction("needs_more.function")


def test_module_that_exits_when_imported_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "script.py").write_text("exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"function='script.f'\): importing it: raised SystemExit: 0 .*script.py, line 1"
    ):
        RewardFunction("script.f")


@pytest.mark.parametrize("function", [lambda texts: texts, lambda p, r: r, lambda prompt, response, /: 0, lambda *a: a])
def test_function_that_names_neither_text_is_refused(function: Any):
    """Arguments are not matched by position: ``(completions, answer)`` would get the prompts as completions."""
    with pytest.raises(
        TypeError, match=r"takes neither prompts nor responses .* by name; expected is a function \(prom"
    ):
        RewardFunction(function)
