"""RewardNormalization against moments taken with the standard library."""

import statistics
from typing import Any

import pytest

from lit_ppo.callbacks import RewardNormalization
from tests.helpers.toy_runs import scores_after
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


def z_scores(scores: list[float], seen: list[float]) -> list[float]:
    mean, deviation = statistics.fmean(seen), statistics.stdev(seen)
    return [(score - mean) / deviation for score in scores]


def test_running_statistics_are_those_of_everything_seen_this_update_included():
    for update, scores in enumerate(scores_after(RewardNormalization(), *SCORES)[0]):
        everything = [score for batch in SCORES[: update + 1] for score in batch]
        assert scores == pytest.approx(z_scores(SCORES[update], everything), rel=1e-6)


def test_batch_statistics_are_this_updates():
    first, second, alike = scores_after(RewardNormalization(statistics="batch"), *SCORES)[0]
    assert first == pytest.approx(z_scores(SCORES[0], SCORES[0]), rel=1e-6)
    assert second == pytest.approx(z_scores(SCORES[1], SCORES[1]), rel=1e-6)
    assert alike == [0.0] * 4  # no deviation to divide by


def test_given_moments_are_used_as_they_are():
    first, second, _ = scores_after(RewardNormalization(statistics="given", mean=4.0, std=2.0), *SCORES)[0]
    assert first == [-1.5, -1.0, -0.5, 3.0]
    assert second == [48.0, 50.0, 47.0, 43.0]
    assert scores_after(RewardNormalization(statistics="given", mean=0, std=2), SCORES[0])[0] == [[0.5, 1.0, 1.5, 5.0]]


@pytest.mark.parametrize("options", [{"statistics": "running"}, {"statistics": "given", "mean": 4.0, "std": 2.0}])
def test_clip_comes_after(options: dict[str, Any]):
    clipped, free = (scores_after(RewardNormalization(clip, **options), *SCORES)[0] for clip in (0.6, None))
    for ours, scores in zip(clipped, free, strict=True):
        assert ours == pytest.approx([min(max(z, -0.6), 0.6) for z in scores], rel=1e-6)
    assert (min(clipped[0]), max(clipped[0])) == pytest.approx((-0.6, 0.6))


def test_single_score_becomes_zero():
    assert scores_after(RewardNormalization(), [3.0])[0] == [[0.0]]
