"""RewardNormalization against moments taken with the standard library."""

import statistics

import pytest
import torch

from lit_ppo.callbacks import RewardNormalization
from tests.helpers.toy import run_updates
from tests.helpers.trick import Trick

TRICK = {
    "RewardNormalization": Trick(
        acts={"clip": 1.0},
        refuses={"clip": -1.0, "statistics": "epoch", "std": 2.0, "mean": 1.0},
        knobs={
            "clip": ({}, {"clip": None}),
            "statistics": ({}, {"statistics": "batch"}),
            "mean": tuple({"statistics": "given", "std": 1.0, "mean": mean} for mean in (4.0, 5.0)),
            "std": tuple({"statistics": "given", "std": std, "mean": 5.0} for std in (5.0, 6.0)),
        },
    )
}

SCORES = [[1.0, 2.0, 3.0, 10.0], [100.0, 104.0, 98.0, 90.0], [5.0, 5.0, 5.0, 5.0]]


def normalised(trick: RewardNormalization, updates: int = 3, **options) -> list[list[float]]:
    module = run_updates(trick, updates, episodes=4, scores=lambda update: SCORES[update], **options)
    return [experience.scores.tolist() for experience in module.experiences]


def z_scores(scores: list[float], seen: list[float]) -> list[float]:
    mean, deviation = statistics.fmean(seen), statistics.stdev(seen)
    return [(score - mean) / deviation for score in scores]


def test_running_statistics_are_those_of_everything_seen_this_update_included():
    for update, scores in enumerate(normalised(RewardNormalization(statistics="running"))):
        everything = [score for batch in SCORES[: update + 1] for score in batch]
        assert scores == pytest.approx(z_scores(SCORES[update], everything), rel=1e-6)


def test_running_is_the_default():
    assert normalised(RewardNormalization()) == normalised(RewardNormalization(statistics="running"))


def test_batch_statistics_are_this_updates():
    first, second, alike = normalised(RewardNormalization(statistics="batch"))
    assert first == pytest.approx(z_scores(SCORES[0], SCORES[0]), rel=1e-6)
    assert second == pytest.approx(z_scores(SCORES[1], SCORES[1]), rel=1e-6)
    assert alike == [0.0] * 4  # no deviation to divide by


def test_given_moments_are_used_as_they_are():
    first, second, _ = normalised(RewardNormalization(statistics="given", mean=4.0, std=2.0))
    assert first == [-1.5, -1.0, -0.5, 3.0]
    assert second == [48.0, 50.0, 47.0, 43.0]
    assert normalised(RewardNormalization(statistics="given", mean=0.0, std=2.0), 1) == [[0.5, 1.0, 1.5, 5.0]]


@pytest.mark.parametrize(
    "options", [{"statistics": "batch"}, {"statistics": "running"}, {"statistics": "given", "mean": 4.0, "std": 2.0}]
)
def test_clip_comes_after(options):
    plain = normalised(RewardNormalization(**options))
    clipped = normalised(RewardNormalization(clip=0.6, **options))
    for bounded, free in zip(clipped, plain, strict=True):
        assert bounded == pytest.approx([min(max(z, -0.6), 0.6) for z in free], rel=1e-6)
    assert max(clipped[0]) == pytest.approx(0.6)
    assert min(clipped[0]) == pytest.approx(-0.6)


def test_raw_scores_stay_and_rewards_follow():
    module = run_updates(RewardNormalization(), episodes=4, kl_coef=0.0, scores=lambda update: SCORES[update])
    (experience,) = module.experiences
    assert experience.raw_scores.tolist() == SCORES[0]
    assert experience.rewards.sum(1).tolist() == pytest.approx(experience.scores.tolist())


def test_single_score_becomes_zero():
    module = run_updates(RewardNormalization(), episodes=1, scores=lambda update: [3.0])
    assert module.experiences[0].scores.tolist() == [0.0]


def test_long_runs_lose_no_precision():
    """Scores far from 0 beside their deviation, over many updates: naive sums of squares would give nonsense."""
    trick = RewardNormalization()
    random = torch.Generator().manual_seed(0)
    batches = [1e4 + torch.randn(8, generator=random) for _ in range(200)]
    for scores in batches:
        experience = type("Rows", (), {"scores": scores})()
        trick.on_scores(None, None, experience)
    seen = torch.cat(batches).double()
    expected = (batches[-1].double() - seen.mean()) / seen.std()
    assert experience.scores.tolist() == pytest.approx(expected.tolist(), abs=2e-3)  # float32 resolves 1e4 to 1e-3
    count, mean, m2 = trick.state_dict()["moments"]
    assert (count, mean) == (1600, pytest.approx(seen.mean().item(), rel=1e-12))
    assert (m2 / (count - 1)) ** 0.5 == pytest.approx(seen.std().item(), rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"statistics": "given"},
        {"statistics": "given", "mean": 1.0},
        {"statistics": "given", "std": 1.0},
        {"statistics": "batch", "mean": 1.0},
        {"statistics": "running", "std": 1.0},
    ],
)
def test_moments_go_with_given_alone(options):
    with pytest.raises(
        ValueError, match=r"RewardNormalization\(statistics=.*give mean and std with statistics='given'"
    ):
        RewardNormalization(**options)


def test_given_deviation_must_be_positive():
    with pytest.raises(ValueError, match=r"RewardNormalization\(std=0.0\)"):
        RewardNormalization(statistics="given", mean=1.0, std=0.0)
