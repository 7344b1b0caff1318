"""RewardScaling against deviations worked out by their definition."""

from typing import Any

import pytest

from lit_ppo.callbacks import RewardScaling
from tests.helpers.toy_runs import scores_after
from tests.helpers.trick import Trick

TRICK = {
    "RewardScaling": Trick(
        acts={},
        refuses={"statistics": "given", "decay": 1.0},
        knobs={"statistics": ({}, {"statistics": "batch"}), "decay": ({}, {"decay": 0.5})},
    )
}


SCORES = [[1.0, 2.0, 3.0, 10.0], [100.0, 104.0, 98.0, 90.0], [5.0, 5.0, 5.0, 5.0]]


@pytest.mark.parametrize("decay", [None, 0.5])
def test_running_deviation_weighs_scores_by_their_age_in_updates(decay: float | None):
    """By the definition of a weighted mean and variance, this update included: weights 1, decay, decay squared."""
    for update, scores in enumerate(scores_after(RewardScaling(decay=decay), *SCORES)[0]):
        weights = [(decay or 1.0) ** age for age in range(update, -1, -1) for _ in range(4)]
        seen = [score for batch in SCORES[: update + 1] for score in batch]
        mean = sum(w * x for w, x in zip(weights, seen, strict=True)) / sum(weights)
        squares = sum(w * (x - mean) ** 2 for w, x in zip(weights, seen, strict=True))
        deviation = (squares / (sum(weights) - 1)) ** 0.5
        assert scores == pytest.approx([score / deviation for score in SCORES[update]], rel=1e-6)


def test_batch_deviation_is_this_updates():
    """1, 2, 3, 10: mean 4, squares 9 + 4 + 1 + 36 = 50, over 3. 100, 104, 98, 90: mean 98, 4 + 36 + 0 + 64 = 104."""
    first, second, alike = scores_after(RewardScaling(statistics="batch"), *SCORES)[0]
    assert first == pytest.approx([score / (50 / 3) ** 0.5 for score in SCORES[0]], rel=1e-6)
    assert second == pytest.approx([score / (104 / 3) ** 0.5 for score in SCORES[1]], rel=1e-6)
    assert alike == SCORES[2]  # no deviation to divide by


@pytest.mark.parametrize("options", [{}, {"statistics": "batch"}, {"decay": 0.9}])
@pytest.mark.parametrize("scores", [[3.0], [0.1] * 7, [0.0, 0.0], [3.00001, 3.0]])
def test_scores_without_a_deviation_stay(options: dict[str, Any], scores: list[float]):
    assert scores_after(RewardScaling(**options), scores)[0] == [pytest.approx(scores, rel=1e-6)]


def test_the_smallest_deviation_that_counts():
    """Two scores d apart have the deviation d / sqrt(2): 0.0002 apart is over 1e-4, 0.0001 is not."""
    for apart, expected in [(2e-4, 2**0.5), (1e-4, 1e-4)]:
        assert scores_after(RewardScaling("batch"), [0.0, apart])[0] == [pytest.approx([0.0, expected], rel=1e-5)]


def test_single_scores_are_scaled_once_there_were_several():
    """1, then 5: mean 3, squares 4 + 4 over 1."""
    assert scores_after(RewardScaling(), [1.0], [5.0])[0] == [[1.0], [pytest.approx(5 / 8**0.5, rel=1e-6)]]
