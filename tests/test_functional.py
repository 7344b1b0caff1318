"""The mathematics against brute force: plain Python loops over float64 numbers.

Small examples by hand are in the docstrings, which tests/test_docstrings.py runs.
"""

import inspect
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_ppo import functional as F
from lit_ppo.device import _cpu_rounds_to_bf16, rounds_to_bf16

NAN = float("nan")
LENGTHS = [1, 3, 5, 2, 5]  # one token, full length, and between
B, T, V = len(LENGTHS), max(LENGTHS), 7
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept(x: Tensor, mask: Tensor = MASK) -> list[float]:
    """The unmasked values, row by row."""
    return [x[b][t].item() for b in range(len(x)) for t in range(x.shape[1]) if mask[b][t]]


def filled(x: Tensor, value: float = NAN) -> Tensor:
    return x.masked_fill(~MASK, value)


def close(actual: Tensor, expected: Tensor | float | list, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance, equal_nan=True
    )


# products


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [5, 16, 64, 256, 1000])
def test_products_of_bf16_numbers_are_summed_in_float32_for_any_size(hidden, held):
    """Against float64 of the rounded numbers, also where a CPU's units for bf16 would not take the product."""
    g = torch.Generator().manual_seed(0)
    for n in (1, 3, 31, 32, 33, 100):
        for vocabulary in (5, 40, 500, 5_000):
            x = torch.randn(n, hidden, generator=g) / hidden**0.5
            weight = torch.randn(vocabulary, hidden, generator=g).to(held)
            bias = torch.randn(vocabulary, generator=g)
            exact = torch.nn.functional.linear(*(y.bfloat16().double() for y in (x, weight, bias)))
            found = F.float32_linear(x, F.for_products(weight, torch.bfloat16), bias, torch.bfloat16)
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
            weight = F.rounded(weight, torch.bfloat16)
            found = F.float32_linear(x, weight, bias, torch.bfloat16, is_rounded=True)
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def test_wide_layers_go_to_the_units_for_bf16_too() -> None:
    """If the CPU has them; without, weights are copied. A layer of too few weights or outputs is copied everywhere."""
    found = {hidden: rounds_to_bf16("cpu", 50_257, hidden) for hidden in (64, 256, 512, 1024, 2048, 5120)}
    assert len({*found.values()}) == 1, found
    assert not rounds_to_bf16("cpu", 8, 5120)
    assert not rounds_to_bf16("cpu", 100, 64)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_change_what_a_cpu_rounds(default: torch.dtype) -> None:
    before = _cpu_rounds_to_bf16.__wrapped__(256)
    torch.set_default_dtype(default)
    try:
        assert _cpu_rounds_to_bf16.__wrapped__(256) == before
    finally:
        torch.set_default_dtype(torch.float32)


def test_float32_products_keep_float32_and_float64_numbers():
    for dtype in (torch.float32, torch.float64):
        x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((40, 70), (300, 70), (300,)))
        found = F.float32_linear(x, F.for_products(weight, dtype), bias, dtype)
        assert found.equal(torch.nn.functional.linear(x, weight, bias))


# masked moments


def test_masked_mean_is_the_mean_of_what_is_kept():
    x = normal(B, T)
    close(F.masked_mean(x, MASK), statistics.fmean(kept(x)))
    rows = [statistics.fmean(x[b, :n].tolist()) for b, n in enumerate(LENGTHS)]
    close(F.masked_mean(x, MASK, dim=1), rows)


def test_of_nothing_one_value_and_equal_values_the_moments_are_zero():
    x, nothing = torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)
    assert F.masked_mean(x, nothing).item() == F.masked_var(x, nothing).item() == 0.0
    assert F.masked_mean(x, nothing, dim=1).tolist() == [0.0, 0.0]
    for mask in (torch.tensor([[True, False]]), torch.tensor([[True, True]])):
        assert F.whiten(torch.full((1, 2), 3.0), mask).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("unbiased", "variance"), [(True, statistics.variance), (False, statistics.pvariance)])
def test_masked_var_whiten_and_scale(unbiased: bool, variance: Callable[[list[float]], float]):
    x = 3 + 2 * normal(B, T)
    values = kept(x)
    close(F.masked_var(x, MASK, unbiased), variance(values))
    deviation = math.sqrt(variance(values) + 1e-8)
    whitened = [(value - statistics.fmean(values)) / deviation for value in values]
    assert kept(F.whiten(x, MASK, unbiased)) == pytest.approx(whitened, rel=1e-12)
    scaled = [value + statistics.fmean(values) for value in whitened]
    assert kept(F.scale(x, MASK, unbiased)) == pytest.approx(scaled, rel=1e-12)


def test_merged_moments_are_those_of_all_values():
    values = (1e6 + normal(50)).tolist()  # far from 0, where sums of squares fail
    moments = (0, 0.0, 0.0)
    for start, stop in [(0, 1), (1, 20), (20, 21), (21, 50)]:
        moments = F.merge_moments(*moments, torch.tensor(values[start:stop], dtype=torch.float64))
    assert F.merge_moments(*moments, torch.tensor([])) == moments
    count, mean, m2 = moments
    assert count == 50
    assert mean == pytest.approx(statistics.fmean(values), rel=1e-14)
    assert m2 / (count - 1) == pytest.approx(statistics.variance(values), rel=1e-8)
    in_float32 = torch.tensor([2.0**24, 2.0**24 + 2])  # which has no number for their mean
    assert F.merge_moments(0, 0.0, 0.0, in_float32) == (2, 2.0**24 + 1, 2.0)


# scores


def test_length_penalty_without_a_bound():
    """Lengths 1, 3, 5, 2, 5; columns of padding are no tokens."""
    padded = torch.nn.functional.pad(MASK, (0, 4))
    for mask in (MASK, padded):
        assert F.length_penalty(mask, budget=2, coef=0.5).tolist() == [0.0, 0.5, 1.5, 0.0, 1.5]


# distributions


def _softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(z / temperature) for z in logits]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_entropy_and_vocabulary_kl(temperature: float):
    logits, reference = 3 * normal(B, T, V), 2 * normal(B, T, V, seed=1)
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    logprobs, entropies = F.token_logprobs(logits, ids, temperature), F.entropy(logits, temperature)
    kl = F.vocabulary_kl(logits, reference, temperature)
    assert logprobs.shape == entropies.shape == kl.shape == (B, T)
    for b in range(B):
        for t in range(T):
            p, q = (_softmax(z[b, t].tolist(), temperature) for z in (logits, reference))
            assert logprobs[b, t].item() == pytest.approx(math.log(p[ids[b, t]]), rel=1e-12)
            assert entropies[b, t].item() == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-12)
            expected = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
            assert kl[b, t].item() == pytest.approx(expected, rel=1e-12)


def test_distributions_are_taken_in_float32_at_least():
    logits, ids = normal(2, 3, V).to(torch.bfloat16), torch.zeros(2, 3, dtype=torch.long)
    for actual, exact in [
        (F.token_logprobs(logits, ids), F.token_logprobs(logits.double(), ids)),
        (F.entropy(logits), F.entropy(logits.double())),
    ]:
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=1e-6)


def test_entropy_gradient_agrees_with_finite_differences():
    logits = normal(1, 2, 4).requires_grad_()
    ids = torch.tensor([[1, 3]])
    assert torch.autograd.gradcheck(lambda z: F.entropy(z, 0.8), logits)
    assert torch.autograd.gradcheck(lambda z: F.token_logprobs(z, ids, 0.8), logits)
    logits = torch.tensor([[[0.0, 0.0, -torch.inf]]], requires_grad=True)  # a token that cannot occur adds nothing
    value = F.entropy(logits)
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(2))
    assert logits.grad.isfinite().all()


# KL


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ((), lambda d: d),
        (("k1",), lambda d: d),
        (("k2",), lambda d: d * d / 2),
        (("k3",), lambda d: math.exp(-d) - 1 + d),
    ],
)
def test_kl_estimates_per_token(kind: tuple[str, ...], formula: Callable[[float], float]):
    logprobs, reference = -normal(B, T).abs(), -normal(B, T, seed=1).abs()
    expected = [[formula(logprobs[b, t].item() - reference[b, t].item()) for t in range(T)] for b in range(B)]
    close(F.kl_estimate(logprobs, reference, *kind), expected)


def test_k3_keeps_its_digits_near_zero_and_there_is_no_k4():
    d = torch.tensor([1e-6], dtype=torch.float64)
    assert F.kl_estimate(d, torch.zeros(1), "k3").item() == pytest.approx(1e-12 / 2 - 1e-18 / 6, rel=1e-8, abs=0)
    with pytest.raises(ValueError, match=r"kl_estimate\(kind='k4'\): must be 'k1', 'k2' or 'k3'"):
        F.kl_estimate(d, d, "k4")


# rewards, advantages, returns


def test_score_lands_on_the_last_token_and_kl_on_every_one():
    scores, kl = normal(B), normal(B, T)
    rewards = F.token_rewards(scores, filled(kl), MASK, 0.3)
    for b, n in enumerate(LENGTHS):
        for t in range(T):
            expected = 0.0 if t >= n else -0.3 * kl[b, t].item() + (scores[b].item() if t == n - 1 else 0.0)
            assert rewards[b, t].item() == pytest.approx(expected, abs=1e-15)


def brute_force_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The sum of the definition, term by term."""
    n = len(rewards)
    ahead = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * ahead[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0), (0.0, 0.95)])
def test_gae_is_its_definition(gamma: float, lam: float):
    rewards, values = normal(B, T), normal(B, T, seed=1)
    advantages, returns = F.gae(filled(rewards), filled(values), MASK, gamma, lam)
    for b, n in enumerate(LENGTHS):
        expected = brute_force_gae(rewards[b, :n].tolist(), values[b, :n].tolist(), gamma, lam)
        assert advantages[b].tolist() == pytest.approx([*expected, *[0.0] * (T - n)], rel=1e-12, abs=1e-15)
        expected = [a + v for a, v in zip(expected, values[b, :n].tolist(), strict=True)]
        assert returns[b].tolist() == pytest.approx([*expected, *[0.0] * (T - n)], rel=1e-12, abs=1e-15)


# advantages without a critic


@pytest.mark.parametrize("score", [0.1, 1000.1, -1e6])
@pytest.mark.parametrize("n", [1, 3, 7])
def test_responses_that_are_all_alike_teach_exactly_nothing(score: float, n: int):
    """0.1 added up thrice and divided by 3 is not 0.1 in float32; what is left over would be blown up."""
    scores, group, mask = torch.full((n,), score), torch.full((n,), 4), torch.ones(n, 2, dtype=torch.bool)
    rewards = torch.stack([torch.zeros(n), scores], dim=1)
    assert not F.group_relative_advantages(scores, group, mask).any()
    assert not F.leave_one_out_advantages(rewards, group, mask).any()


def test_reinforce_advantages_are_their_definition():
    rewards = normal(B, T)
    to_go = [[math.fsum(rewards[i, t:n].tolist()) for t in range(n)] for i, n in enumerate(LENGTHS)]
    flat = [value for row in to_go for value in row]
    mean, root = statistics.fmean(flat), math.sqrt(statistics.variance(flat) + 1e-8)
    expected = [[(value - mean) / root for value in row] + [0.0] * (T - len(row)) for row in to_go]
    close(F.reinforce_advantages(filled(rewards), MASK), expected)


def test_a_response_that_is_alone_gets_zero_and_one_without_tokens_counts_for_nothing():
    """The row of 9 is alone in its group; the row of 50 is masked out: 1 and 2 are all that there is to compare."""
    group, mask = torch.tensor([0, 1, 0, 0]), torch.tensor([[True], [True], [False], [True]])
    rewards = torch.tensor([[1.0], [9.0], [50.0], [2.0]])
    assert F.leave_one_out_advantages(rewards, group, mask)[:, 0].tolist() == [-1.0, 0.0, 0.0, 1.0]
    expected = [-(0.5**0.5), 0.0, 0.0, 0.5**0.5]
    assert F.group_relative_advantages(rewards[:, 0], group, mask)[:, 0].tolist() == pytest.approx(expected, rel=1e-6)
    assert F.group_relative_advantages(rewards[:, 0], group, mask, scale=False)[:, 0].tolist() == [-0.5, 0.0, 0.0, 0.5]


# losses


@pytest.mark.parametrize(
    ("clip_range", "low", "high"),
    [((), 0.8, 1.2), ((0.05,), 0.95, 1.05), (([0.1, 0.3],), 0.9, 1.3), ((None,), -math.inf, math.inf)],
)
def test_policy_losses_per_token(clip_range: tuple[Any, ...], low: float, high: float):
    """The second bound, by default 3 times the advantage, is for negative advantages only."""
    assert F.clip_bounds(*(clip_range or (0.2,))) == pytest.approx((low, high))
    new, old, advantages = normal(9, 9), normal(9, 9, seed=1), normal(9, 9, seed=2)
    loss, dual = (f(new, old, advantages, *clip_range) for f in (F.policy_loss, F.dual_clip_policy_loss))
    near = F.dual_clip_policy_loss(new, old, advantages, *(clip_range or (0.2,)), c=1.5)
    for b in range(9):
        for t in range(9):
            ratio, a = math.exp(new[b, t].item() - old[b, t].item()), advantages[b, t].item()
            objective = min(ratio * a, min(max(ratio, low), high) * a)
            assert loss[b, t].item() == pytest.approx(-objective, rel=1e-12)
            for bounded, c in ((dual, 3.0), (near, 1.5)):
                assert bounded[b, t].item() == pytest.approx(-max(objective, c * a) if a < 0 else -objective, rel=1e-12)


def test_policy_gradient_is_zero_where_clipped_and_minus_ratio_times_advantage_elsewhere():
    new = torch.tensor([1.0, 1.5, 0.5, 2.9, 5.0]).log().requires_grad_()
    advantages = torch.tensor([3.0, 1.0, -1.0, -1.0, -1.0])
    for loss, at_five in ((F.policy_loss, 5.0), (F.dual_clip_policy_loss, 0.0)):
        new.grad = None
        loss(new, torch.zeros(5), advantages).sum().backward()
        assert new.grad.tolist() == pytest.approx([-3.0, 0.0, 0.0, 2.9, at_five], rel=1e-6)


def test_value_losses_per_token():
    new, old, returns = normal(9, 9), normal(9, 9, seed=1), normal(9, 9, seed=2)
    plain, clipped = F.value_loss(new, returns), F.clipped_value_loss(new, old, returns, 0.3)
    for b in range(9):
        for t in range(9):
            v, v_old, target = new[b, t].item(), old[b, t].item(), returns[b, t].item()
            near = min(max(v, v_old - 0.3), v_old + 0.3)
            error = 0.5 * (v - target) ** 2
            assert plain[b, t].item() == pytest.approx(error, rel=1e-12)
            assert clipped[b, t].item() == pytest.approx(max(error, 0.5 * (near - target) ** 2), rel=1e-12)


def test_explained_variance():
    values, returns = normal(B, T), normal(B, T, seed=1)
    residual = [r - v for r, v in zip(kept(returns), kept(values), strict=True)]
    expected = 1 - statistics.pvariance(residual) / statistics.pvariance(kept(returns))
    close(F.explained_variance(filled(values), filled(returns), MASK), expected)
    close(F.explained_variance(returns, returns, MASK), 1.0)
    close(F.explained_variance(torch.zeros_like(returns), returns, MASK), 0.0)
    assert not F.explained_variance(values, torch.ones(B, T), MASK).isfinite()  # nothing to explain


# the controller


@pytest.mark.parametrize(("kl", "expected"), [(6.0, 0.15), (0.0, 0.15 * 0.99488), (6.6, 0.15 * 1.00256)])
def test_adaptive_kl_coef_by_hand(kl: float, expected: float):
    assert F.adaptive_kl_coef(0.15, kl, target=6.0, horizon=10_000, n_steps=256) == pytest.approx(expected, rel=1e-12)
    assert F.adaptive_kl_coef(1.0, 12.0, target=6.0, horizon=10, n_steps=5, max_error=0.5) == 1.25


# what lies outside the mask

MASKED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "masked_mean": lambda x, m: F.masked_mean(x, m),
    "masked_mean by row": lambda x, m: F.masked_mean(x, m, dim=1),
    "masked_var": lambda x, m: F.masked_var(x, m),
    "whiten": lambda x, m: F.whiten(x, m),
    "scale": lambda x, m: F.scale(x, m),
    "token_rewards": lambda x, m: F.token_rewards(torch.arange(5.0, dtype=x.dtype)[: len(x)], x, m, 0.1),
    "gae of rewards": lambda x, m: F.gae(x, torch.ones_like(x), m),
    "gae of values": lambda x, m: F.gae(torch.ones_like(x), x, m),
    "leave_one_out_advantages": lambda x, m: F.leave_one_out_advantages(x, torch.tensor([0, 1, 0, 0, 1]), m),
    "reinforce_advantages": lambda x, m: F.reinforce_advantages(x, m),
    "explained_variance": lambda x, m: F.explained_variance(x, x.square(), m),
}
EVERY_MASKED = pytest.mark.parametrize("function", MASKED.values(), ids=MASKED.keys())


@EVERY_MASKED
@pytest.mark.parametrize("garbage", [NAN, torch.inf, -torch.inf, 1e30])
def test_what_lies_outside_the_mask_never_leaks_in(function: Callable[[Tensor, Tensor], object], garbage: float):
    """Nor do further columns, and arguments stay as they are."""
    x, mask = filled(normal(B, T), garbage), MASK.clone()
    before, expected = x.clone(), _tensors(function(filled(x, 0.0), MASK))
    for actual, clean in zip(_tensors(function(x, mask)), expected, strict=True):
        torch.testing.assert_close(actual, clean, rtol=0, atol=0)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(mask, MASK)
    wide = (torch.nn.functional.pad(one, (0, 4), value=value) for one, value in ((x, garbage), (MASK, False)))
    for actual, clean in zip(_tensors(function(*wide)), expected, strict=True):
        if clean.ndim == 2:
            clean = torch.nn.functional.pad(clean, (0, 4))
        torch.testing.assert_close(actual, clean, rtol=1e-12, atol=1e-12)


def _tensors(result: object) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@EVERY_MASKED
def test_gradient_is_zero_and_never_nan_outside_the_mask(function: Callable[[Tensor, Tensor], object]):
    x = filled(normal(B, T), 1e30).requires_grad_()
    result = function(x, MASK)
    total = result[0].sum() + result[1].sum() if isinstance(result, tuple) else result.square().sum()
    total.backward()
    assert x.grad.isfinite().all()
    assert not x.grad[~MASK].any()


# schedules, weights and averages


def test_to_the_last_bit():
    """A schedule ends exactly at its end, and an average that has nowhere to go stays."""
    assert F.linear_schedule(0.9, 0.1, 9, steps=4) == 0.1
    goal = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert F.moving_average(goal, goal.clone(), 0.99).equal(goal)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.021, 0.04), (0.02, 0.06), (0.005, 0.06), (0.0049, 0.09), (1.0, 0.04), (0.0, 0.06), (1e-11, 0.06)],
)
def test_adaptive_learning_rate_keeps_to_a_factor_of_two_and_to_its_bounds(kl, expected):
    assert F.adaptive_learning_rate(0.06, kl, 0.01, 1.5, minimum=0.001, maximum=1.0) == pytest.approx(expected)
    within = F.adaptive_learning_rate(0.06, kl, 0.01, 1.5, minimum=0.05, maximum=0.08)
    assert within == pytest.approx(min(max(expected, 0.05), 0.08))


# the file itself


def test_every_function_is_tested_here_or_by_an_example_in_its_docstring():
    text = Path(__file__).read_text()
    for name, function in inspect.getmembers(F, inspect.isfunction):
        if function.__module__ == F.__name__ and not name.startswith("_"):
            assert f"F.{name}" in text or ">>>" in str(function.__doc__), f"nothing tests {name}"


@pytest.mark.parametrize(
    ("falling", "rising", "expected"),
    [
        ([0.0, 1.0, 0.5], [[5.0, 6.0, 7.0]], False),  # no more than the fall asked for
        ([0.0, 1.0, 0.4], [[9.0, 6.0, 6.0]], False),  # the other is where it was
        ([0.0, 1.0, 0.4], [[5.0, 6.0, 7.0], [5.0, 6.0, 5.0]], False),  # one of two has fallen, too
        ([1.0, 1.0, 0.4], [[5.0, 8.0, 7.0]], True),  # of two best ones the first counts
        ([0.0, 1.0], [[5.0, 6.0]], False),  # the best is now
        ([1.0], [[1.0]], False),
    ],
)
def test_diverging_by_hand(falling: list[float], rising: list[list[float]], expected: bool):
    assert F.diverging(falling, rising, fall=0.5) is expected


# ---- best of groups


@pytest.mark.parametrize("seed", range(2))
def test_best_of_groups_by_going_through_the_rows(seed):
    """Few different scores, so that groups have ties: the first of the best wins."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (30,), generator=generator).float()
    group = torch.randint(-4, 8, (30,), generator=generator)
    best: dict[int, int] = {}
    for row, (score, number) in enumerate(zip(scores.tolist(), group.tolist(), strict=True)):
        if number not in best or score > scores[best[number]]:
            best[number] = row
    assert F.best_of_groups(scores, group).tolist() == sorted(best.values())
    rows = list(zip(scores.tolist(), group.tolist(), strict=True))
    spans = {number: [score for score, other in rows if other == number] for _, number in rows}
    for tolerance in (0.0, 1.0):
        alike = [max(spans[number]) - min(spans[number]) <= tolerance for _, number in rows]
        assert F.groups_alike(scores, group, tolerance).tolist() == alike


def test_distinct_ngrams_by_hand() -> None:
    """Rows 4 5 4 5, 4 5, 9. Bigrams 45, 54, 45; 45; none: 2 of 4. Unigrams: 4, 5, 9 of 7. Trigrams: 454, 545."""
    ids = torch.tensor([[4, 5, 4, 5], [4, 5, 4, 5], [9, 4, 5, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    assert [F.distinct_ngrams(ids, mask, n) for n in (1, 2, 3, 4, 5)] == [3 / 7, 2 / 4, 1.0, 1.0, 1.0]
    assert F.distinct_ngrams(ids[1:], mask[1:], 3) == 1.0  # none at all
    assert F.distinct_ngrams(ids[:2, :2], mask[:2, :2], 2) == 0.5  # the n-gram is the whole response


def test_duplicates_and_openings_by_hand() -> None:
    """What is masked does not count: rows 0, 1 and 4 are ``4 5``, rows 2 and 3 differ in length alone."""
    ids = torch.tensor([[4, 5, 7], [4, 5, 8], [4, 5, 6], [4, 0, 0], [4, 5, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    assert F.duplicate_fraction(ids, mask) == pytest.approx(2 / 5)
    assert F.largest_opening(ids, mask, 1) == 1.0
    assert F.largest_opening(ids, mask, 2) == pytest.approx(4 / 5)
    assert F.largest_opening(ids, mask, 3) == pytest.approx(3 / 5)
    assert F.largest_opening(ids, mask, 9) == pytest.approx(3 / 5)
    assert F.duplicate_fraction(ids[3:].fill_(0), mask[3:]) == 0.0  # ``0`` and ``0 0``, whatever the padding is


def test_bins_of_positions_grow_with_the_position():
    """Each doubling from 16 on has eight bins of equal width, counted one after the other."""
    expected, width = list(range(16)), 2
    while len(expected) < 2000:
        for _ in range(8):
            expected += [expected[-1] + 1] * width
        width *= 2
    assert F.position_bins(2000).tolist() == expected[:2000]
    assert int(F.position_bins(40_000).max()) == F.POSITION_BINS - 1


def test_projections_keep_inner_products():
    """Of 40 states of 3,000 numbers, cosines of their projections to 1,000 differ by about 1 / sqrt(1000) = 0.03."""
    states = torch.randn(40, 3000, generator=torch.Generator().manual_seed(1))
    some = F.random_projection(states, 1000)
    cosines = [torch.corrcoef(x).flatten() for x in (states, some)]
    assert some.shape == (40, 1000)
    assert float((cosines[0] - cosines[1]).abs().max()) < 0.2
    assert float((some.norm(dim=1) / states.norm(dim=1)).std()) < 0.05
