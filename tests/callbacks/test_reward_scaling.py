"""RewardScaling against deviations taken with the standard library and with torch."""

import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_ppo.callbacks import RewardClipping, RewardNormalization, RewardScaling
from tests.helpers.first_update import first_update, return_mean
from tests.helpers.toy import run_updates
from tests.helpers.trick import Trick

TRICK = {
    "RewardScaling": Trick(
        acts={},
        refuses={"statistics": "given", "decay": 1.0},
        knobs={"statistics": ({}, {"statistics": "batch"}), "decay": ({}, {"decay": 0.5})},
    )
}

SCORES = [[1.0, 2.0, 3.0, 10.0], [100.0, 104.0, 98.0, 90.0], [5.0, 5.0, 5.0, 5.0]]


def scaled(trick: RewardScaling, updates: int = 3, **options) -> list[list[float]]:
    module = run_updates(trick, updates, episodes=4, scores=lambda update: SCORES[update], **options)
    return [experience.scores.tolist() for experience in module.experiences]


def test_running_deviation_is_of_everything_seen_this_update_included():
    for update, scores in enumerate(scaled(RewardScaling(statistics="running"))):
        deviation = torch.tensor(SCORES[: update + 1]).double().std().item()
        assert scores == pytest.approx([score / deviation for score in SCORES[update]], rel=1e-6)


def test_running_without_decay_is_the_default():
    assert scaled(RewardScaling()) == scaled(RewardScaling(statistics="running", decay=None))


def test_batch_deviation_is_this_updates():
    """1, 2, 3, 10: mean 4, squares 9 + 4 + 1 + 36 = 50, over 3. 100, 104, 98, 90: mean 98, 4 + 36 + 0 + 64 = 104."""
    first, second, alike = scaled(RewardScaling(statistics="batch"))
    assert first == pytest.approx([score / (50 / 3) ** 0.5 for score in SCORES[0]], rel=1e-6)
    assert second == pytest.approx([score / (104 / 3) ** 0.5 for score in SCORES[1]], rel=1e-6)
    assert alike == SCORES[2]  # no deviation to divide by


def test_decay_weighs_scores_by_their_age_in_updates():
    """By the definition of a weighted mean and variance, weights 1, decay, decay squared."""
    for update, scores in enumerate(scaled(RewardScaling(decay=0.5))):
        ages = [age for age in range(update, -1, -1) for _ in range(4)]
        seen = [score for batch in SCORES[: update + 1] for score in batch]
        weights = [0.5**age for age in ages]
        mean = sum(w * x for w, x in zip(weights, seen, strict=True)) / sum(weights)
        squares = sum(w * (x - mean) ** 2 for w, x in zip(weights, seen, strict=True))
        deviation = (squares / (sum(weights) - 1)) ** 0.5
        assert scores == pytest.approx([score / deviation for score in SCORES[update]], rel=1e-6)


def test_decay_forgets_where_the_plain_average_does_not():
    """A wild first update, then 40 of deviation 1: weights of 0.5^40 leave nothing of it."""
    forgetful, faithful = RewardScaling(decay=0.5), RewardScaling()
    random = torch.Generator().manual_seed(0)
    batches = [1000 * torch.randn(64, generator=random), *(torch.randn(64, generator=random) for _ in range(40))]
    for batch in batches:
        one, other = SimpleNamespace(scores=batch), SimpleNamespace(scores=batch)
        forgetful.on_scores(None, None, one)
        faithful.on_scores(None, None, other)
    assert one.scores.std().item() == pytest.approx(1.0, abs=0.2)
    assert other.scores.std().item() == pytest.approx(1 / torch.cat(batches).std().item(), rel=0.2)


@pytest.mark.parametrize("options", [{}, {"statistics": "batch"}, {"decay": 0.9}])
@pytest.mark.parametrize("scores", [[3.0], [-7.0, -7.0, -7.0], [0.1] * 7, [0.0, 0.0], [3.00001, 3.0]])
def test_scores_without_a_deviation_stay(options, scores: list[float]):
    module = run_updates(RewardScaling(**options), episodes=len(scores), scores=lambda update: scores)
    assert module.experiences[0].scores.tolist() == pytest.approx(scores, rel=1e-6)


def test_the_smallest_deviation_that_counts():
    """Two scores d apart have the deviation d / sqrt(2): 0.0002 apart is over 1e-4, 0.0001 is not."""
    for apart, expected in [(2e-4, 2**0.5), (1e-4, 1e-4)]:
        rows = SimpleNamespace(scores=torch.tensor([0.0, apart]))
        RewardScaling("batch").on_scores(None, None, rows)
        assert rows.scores.tolist() == pytest.approx([0.0, expected], rel=1e-5)


def test_single_scores_are_scaled_once_there_were_several():
    """1, then 5: mean 3, squares 4 + 4 over 1."""
    module = run_updates(RewardScaling(), 2, episodes=1, scores=lambda update: [1.0 + 4 * update])
    assert [e.scores.item() for e in module.experiences] == pytest.approx([1.0, 5 / 8**0.5], rel=1e-6)


def test_raw_scores_stay_and_rewards_follow():
    module = run_updates(RewardScaling(), episodes=4, kl_coef=0.0, scores=lambda update: SCORES[update])
    (experience,) = module.experiences
    assert experience.raw_scores.tolist() == SCORES[0]
    assert experience.rewards.sum(1).tolist() == pytest.approx([score / (50 / 3) ** 0.5 for score in SCORES[0]])


def test_long_runs_lose_no_precision():
    """Scores far from 0 beside their deviation, over many updates: naive sums of squares would give nonsense."""
    trick = RewardScaling()
    random = torch.Generator().manual_seed(0)
    batches = [1e4 + torch.randn(8, generator=random) for _ in range(200)]
    for scores in batches:
        rows = SimpleNamespace(scores=scores)
        trick.on_scores(None, None, rows)
    deviation = torch.cat(batches).double().std()
    torch.testing.assert_close(rows.scores, (batches[-1].double() / deviation).float(), rtol=1e-6, atol=0)


def test_returns_of_litppo_shrink_by_the_deviation(tmp_path: Path, tiny_lm: Path):
    experience, row = first_update(tmp_path, tiny_lm, RewardScaling())
    raw = experience.raw_scores.tolist()
    deviation = statistics.stdev(raw)
    assert abs(deviation - 1) > 0.1
    assert row["value/return_mean"] == pytest.approx(return_mean(experience, raw) / deviation, rel=1e-5)


@pytest.mark.parametrize("scaling_first", [True, False])
def test_refused_beside_a_normalisation(scaling_first: bool):
    tricks = [RewardScaling(), RewardNormalization()]
    with pytest.raises(ValueError, match="RewardScaling and RewardNormalization: both would rescale the scores"):
        run_updates(tricks if scaling_first else tricks[::-1])


def test_decay_goes_with_running_alone():
    with pytest.raises(ValueError, match=r"RewardScaling\(decay=0.9\): has no effect with statistics='batch'"):
        RewardScaling(statistics="batch", decay=0.9)
    for decay in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"RewardScaling\(decay="):
            RewardScaling(decay=decay)


def test_clipping_may_follow():
    """First update's scores over 4.08: 0.24, 0.49, 0.73, 2.45."""
    module = run_updates([RewardScaling(), RewardClipping(2.0)], episodes=4, scores=lambda update: SCORES[update])
    assert module.experiences[0].scores.tolist() == pytest.approx([0.244949, 0.489898, 0.734847, 2.0], rel=1e-5)
