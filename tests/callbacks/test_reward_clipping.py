"""RewardClipping against numbers worked by hand."""

from typing import Any

import pytest

from lit_ppo.callbacks import RewardClipping, RewardNormalization, RewardScaling
from tests.helpers.toy_runs import scores_after
from tests.helpers.trick import Trick

TRICK = {
    "RewardClipping": Trick(
        acts={"limit": 4.0},
        refuses={"limit": 0.0},
        knobs={"limit": ({}, {"limit": 5.0})},
    )
}


def test_scores_beyond_the_limit_become_the_limit():
    """-7, 2.001 and 90 of eight; those on the limit are not clipped."""
    (scores,), logged = scores_after(RewardClipping(2.0), [-7.0, -2.0, -1.5, 0.0, 0.5, 2.0, 2.001, 90.0])
    assert scores == [-2.0, -2.0, -1.5, 0.0, 0.5, 2.0, 2.0, 2.0]
    assert logged["reward/clipped_fraction"] == pytest.approx(3 / 8)


@pytest.mark.parametrize(
    ("tricks", "expected"),
    [
        ([RewardNormalization(), RewardClipping(0.6)], [-0.6, 0.0, 0.6]),
        ([RewardClipping(0.6), RewardNormalization()], [-1.0, 0.0, 1.0]),
        ([RewardScaling(), RewardClipping(0.6)], [-0.6, 0.0, 0.6]),
    ],
)
def test_its_place_beside_what_changes_the_unit_is_the_users_choice(tricks: list[Any], expected: list[float]):
    """-600, 0, 600 have the z-scores -1, 0, 1, and so have -0.6, 0, 0.6, which they are once clipped."""
    (scores,), _ = scores_after(tricks, [-600.0, 0.0, 600.0])
    assert scores == pytest.approx(expected, rel=1e-6)
