"""RewardClipping against numbers worked by hand."""

from pathlib import Path

import pytest

from lit_ppo.callbacks import RewardClipping, RewardNormalization
from tests.helpers.first_update import first_update, return_mean
from tests.helpers.toy import run_updates
from tests.helpers.trick import Trick

TRICK = {
    "RewardClipping": Trick(
        acts={"limit": 4.0},
        refuses={"limit": 0.0},
        knobs={"limit": ({}, {"limit": 5.0})},
    )
}

SCORES = [-7.0, -2.0, -1.5, 0.0, 0.5, 2.0, 2.001, 90.0]


def test_scores_beyond_the_limit_become_the_limit():
    module = run_updates(RewardClipping(2.0), scores=lambda update: SCORES, kl_coef=0.0)
    (experience,) = module.experiences
    assert experience.scores.tolist() == [-2.0, -2.0, -1.5, 0.0, 0.5, 2.0, 2.0, 2.0]
    assert experience.rewards.sum(1).tolist() == experience.scores.tolist()
    assert experience.raw_scores.tolist() == pytest.approx(SCORES)


def test_fraction_beyond_the_limit_is_logged():
    """-7, 2.001 and 90 of eight; those on the limit are not clipped."""
    module = run_updates(RewardClipping(2.0), scores=lambda update: SCORES)
    assert module.trainer.logged_metrics["reward/clipped_fraction"].item() == pytest.approx(3 / 8)


@pytest.mark.parametrize(("clipping_first", "expected"), [(False, [-0.6, 0.0, 0.6]), (True, [-1.0, 0.0, 1.0])])
def test_its_place_beside_a_normalisation_is_the_users_choice(clipping_first: bool, expected: list[float]):
    """-600, 0, 600 have the z-scores -1, 0, 1, and so have -0.6, 0, 0.6, which they are once clipped."""
    scores = [-600.0, 0.0, 600.0]
    tricks = [RewardNormalization(), RewardClipping(0.6)]
    module = run_updates(tricks[::-1] if clipping_first else tricks, episodes=3, scores=lambda update: scores)
    assert module.experiences[0].scores.tolist() == pytest.approx(expected, rel=1e-6)


def test_returns_of_litppo_are_those_of_the_clipped_scores(tmp_path: Path, tiny_lm: Path):
    plain, before = first_update(tmp_path, tiny_lm)
    raw = plain.raw_scores.tolist()
    limit = sorted(raw)[3]
    experience, row = first_update(tmp_path, tiny_lm, RewardClipping(limit))
    assert experience.raw_scores.tolist() == raw
    beyond = [score for score in raw if score > limit]
    assert 0 < len(beyond) < 4
    assert row["reward/clipped_fraction"] == pytest.approx(len(beyond) / 7)
    assert row["value/return_mean"] == pytest.approx(return_mean(experience, [min(s, limit) for s in raw]), rel=1e-5)
    assert row["value/return_mean"] < before["value/return_mean"] - 0.01
