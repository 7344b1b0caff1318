"""RewardWhitening against moments taken with the standard library."""

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_ppo.callbacks import RewardWhitening
from tests.helpers.first_update import LAMBDA, first_update
from tests.helpers.trick import Trick

TRICK = {
    "RewardWhitening": Trick(
        acts={},
        refuses={"rows": 0},
        knobs={"rows": ({}, {"rows": 3}), "unbiased": ({}, {"unbiased": False})},
    )
}


REWARDS = [[1.0, 5.0], [2.0], [-1.0, 0.0, 7.0], [4.0, 4.0], [0.5, -3.0, 2.0]]


def whitened(trick: RewardWhitening, rewards: list[list[float]]) -> list[float]:
    """All responses' rewards, one after the other; what lies in the padding would spoil everything."""
    width = max(map(len, rewards)) + 2
    values = torch.tensor([row + [float("nan")] * (width - len(row)) for row in rewards])
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in rewards])
    experience: Any = SimpleNamespace(rewards=values, response_mask=mask)
    trick.on_rewards(None, None, experience)
    assert experience.rewards.shape == mask.shape
    assert not experience.rewards[~mask].any()
    found: list[float] = experience.rewards[mask].tolist()
    return found


def by_hand(rewards: list[list[float]], rows: int | None, unbiased: bool) -> list[list[float]]:
    """Over so many rows at a time, each group's mean plus its z-scores; a single number stays."""
    found: list[list[float]] = []
    for start in range(0, len(rewards), rows or len(rewards)):
        group = rewards[start : start + (rows or len(rewards))]
        values = [value for row in group for value in row]
        if len(values) > 1:
            variance = statistics.variance(values) if unbiased else statistics.pvariance(values)
            mean, deviation = statistics.fmean(values), (variance + 1e-8) ** 0.5
            group = [[mean + (value - mean) / deviation for value in row] for row in group]
        found += group
    return found


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("rows", [None, 1, 2, 3, 99])
def test_deviations_are_scaled_over_consecutive_rows_and_the_mean_stays(rows: int | None, unbiased: bool):
    """The last group may be smaller."""
    expected = [value for row in by_hand(REWARDS, rows, unbiased) for value in row]
    assert whitened(RewardWhitening(rows, unbiased), REWARDS) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [None, 1, 2])
def test_a_group_without_tokens_or_without_a_deviation_stays(rows: int | None):
    assert whitened(RewardWhitening(rows), [[], []]) == []
    assert whitened(RewardWhitening(rows), [[], [], [3.0]]) == [3.0]
    assert whitened(RewardWhitening(rows), [[3.0, 3.0], [3.0]]) == pytest.approx([3.0] * 3)


def test_returns_of_litppo_are_those_of_the_whitened_rewards(tmp_path: Path, tiny_lm: Path):
    """Values and KL are 0 in the first update: a return is the sum of rewards to come, those k tokens away 0.95^k."""
    _, before = first_update(tmp_path, tiny_lm)
    experience, row = first_update(tmp_path, tiny_lm, RewardWhitening(3, unbiased=False))
    lengths, scores = experience.response_mask.sum(1).tolist(), experience.raw_scores.tolist()
    raw = [[0.0] * (n - 1) + [score] for n, score in zip(lengths, scores, strict=True)]
    rewards = by_hand(raw, rows=3, unbiased=False)
    returns = [sum(r * LAMBDA**k for k, r in enumerate(line[t:])) for line in rewards for t in range(len(line))]
    assert row["value/return_mean"] == pytest.approx(statistics.fmean(returns), rel=1e-4)
    assert abs(row["value/return_mean"] - before["value/return_mean"]) > 0.01
