"""Reward functions: what they are passed, and what they may return."""

import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_ppo.rewards import RewardFunction, scores_of
from tests.helpers.rewards import TWO, experience, lengths


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


def test_interrupt_goes_through():
    def my_reward(prompts, responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scores_of(RewardFunction(my_reward), experience(**TWO))


def test_column_that_is_not_there():
    def my_reward(responses, answer):
        return [0.0] * len(responses)

    with pytest.raises(TypeError, match=r"my_reward\): needs answer; there are prompts, .*completions.*, year"):
        scores_of(RewardFunction(my_reward), experience(**TWO, year=[1, 2]))


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


@pytest.mark.parametrize("function", [lambda texts: texts, lambda p, r: r, lambda prompt, response, /: 0, lambda *a: a])
def test_function_that_names_neither_text_is_refused(function: Any):
    """Arguments are not matched by position: ``(completions, answer)`` would get the prompts as completions."""
    with pytest.raises(
        TypeError, match=r"takes neither prompts nor responses .* by name; expected is a function \(prom"
    ):
        RewardFunction(function)
