"""RewardWhitening against moments taken with the standard library."""

import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_ppo.callbacks import RewardWhitening
from tests.helpers.first_update import LAMBDA, first_update
from tests.helpers.toy import run_updates
from tests.helpers.trick import Trick

TRICK = {
    "RewardWhitening": Trick(
        acts={},
        refuses={"rows": 0},
        knobs={"rows": ({}, {"rows": 3}), "unbiased": ({}, {"unbiased": False})},
    )
}

REWARDS = [[1.0, 5.0], [2.0], [-1.0, 0.0, 7.0], [4.0, 4.0], [0.5, -3.0, 2.0]]


def whitened(trick: RewardWhitening, padding: int = 0, rewards: list[list[float]] = REWARDS) -> list[list[float]]:
    """Each response's rewards; what lies in the padding would spoil everything."""
    width = max(map(len, rewards)) + padding
    values = torch.tensor([row + [float("nan")] * (width - len(row)) for row in rewards])
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in rewards])
    experience = SimpleNamespace(rewards=values, response_mask=mask)
    trick.on_rewards(None, None, experience)
    assert experience.rewards.shape == mask.shape
    assert not experience.rewards[~mask].any()
    return [row[kept].tolist() for row, kept in zip(experience.rewards, mask, strict=True)]


def by_hand(rewards: list[list[float]], variance: Callable[[list[float]], float]) -> list[list[float]]:
    values = [value for row in rewards for value in row]
    mean, deviation = statistics.fmean(values), (variance(values) + 1e-8) ** 0.5
    return [[mean + (value - mean) / deviation for value in row] for row in rewards]


def flat(rewards: list[list[float]]) -> list[float]:
    return [value for row in rewards for value in row]


@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize(("unbiased", "variance"), [(True, statistics.variance), (False, statistics.pvariance)])
def test_deviations_are_scaled_and_the_mean_stays(padding: int, unbiased: bool, variance: Callable[..., float]):
    actual = whitened(RewardWhitening(unbiased=unbiased), padding)
    assert flat(actual) == pytest.approx(flat(by_hand(REWARDS, variance)), rel=1e-5)
    assert statistics.fmean(flat(actual)) == pytest.approx(statistics.fmean(flat(REWARDS)), rel=1e-5)
    assert variance(flat(actual)) == pytest.approx(1.0, rel=1e-5)


def test_a_table_by_hand():
    """1, 2, 6: mean 3, squares 4 + 1 + 9 = 14 over 2, deviation 2.6458."""
    actual = flat(whitened(RewardWhitening(), 1, [[1.0, 2.0], [6.0]]))
    assert actual == pytest.approx([3 - 2 / 7**0.5, 3 - 1 / 7**0.5, 3 + 3 / 7**0.5], rel=1e-6)


def test_unbiased_over_everything_is_the_default():
    assert whitened(RewardWhitening()) == whitened(RewardWhitening(rows=None, unbiased=True))
    assert whitened(RewardWhitening()) == whitened(RewardWhitening(rows=5)) == whitened(RewardWhitening(rows=99))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("padding", [0, 3])
def test_groups_are_consecutive_rows_and_the_last_may_be_smaller(rows: int, padding: int):
    expected = []
    for start in range(0, 5, rows):
        group = REWARDS[start : start + rows]
        expected += by_hand(group, statistics.variance) if len(flat(group)) > 1 else group
    assert flat(whitened(RewardWhitening(rows=rows), padding)) == pytest.approx(flat(expected), rel=1e-5)


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_a_group_without_tokens_or_without_a_deviation_stays(rows: int | None):
    empty: list[list[float]] = [[], []]
    assert whitened(RewardWhitening(rows=rows), 2, empty) == empty
    assert whitened(RewardWhitening(rows=rows), 2, [[], [], [3.0]]) == [[], [], [3.0]]
    assert flat(whitened(RewardWhitening(rows=rows), 2, [[3.0, 3.0], [3.0]])) == pytest.approx([3.0] * 3)


def test_returns_follow_on_a_module_that_is_not_ours():
    """The toy's returns are sums of rewards to come; KL of 0 leaves the score on the last token, as seen raw."""
    module = run_updates(RewardWhitening(), kl_coef=0.0)
    (experience,) = module.experiences
    lengths = experience.response_mask.sum(1).tolist()
    raw = [[0.0] * (n - 1) + [score] for n, score in zip(lengths, experience.raw_scores.tolist(), strict=True)]
    sums = [sum(row) for row in by_hand(raw, statistics.variance)]
    assert experience.returns[:, 0].tolist() == pytest.approx(sums, rel=1e-4)
    assert experience.scores.tolist() == experience.raw_scores.tolist()


@pytest.mark.parametrize(("rows", "unbiased"), [(None, True), (3, False)])
def test_returns_of_litppo_are_those_of_the_whitened_rewards(
    tmp_path: Path, tiny_lm: Path, rows: int | None, unbiased: bool
):
    """Values and KL are 0 in the first update: a return is the sum of rewards to come, those k tokens away 0.95^k."""
    plain, before = first_update(tmp_path, tiny_lm)
    experience, row = first_update(tmp_path, tiny_lm, RewardWhitening(rows, unbiased))
    lengths, scores = experience.response_mask.sum(1).tolist(), experience.raw_scores.tolist()
    assert (lengths, scores) == (plain.response_mask.sum(1).tolist(), plain.raw_scores.tolist())
    raw = [[0.0] * (n - 1) + [score] for n, score in zip(lengths, scores, strict=True)]
    rewards: list[list[float]] = []
    for start in range(0, 7, rows or 7):
        variance = statistics.variance if unbiased else statistics.pvariance
        rewards += by_hand(raw[start : start + (rows or 7)], variance)
    returns = [sum(r * LAMBDA**k for k, r in enumerate(line[t:])) for line in rewards for t in range(len(line))]
    assert row["value/return_mean"] == pytest.approx(statistics.fmean(returns), rel=1e-4)
    assert abs(row["value/return_mean"] - before["value/return_mean"]) > 0.01
