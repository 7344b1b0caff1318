"""MissingEndPenalty against numbers worked by hand."""

from pathlib import Path

import pytest

from lit_ppo.callbacks import MissingEndPenalty
from tests.helpers.first_update import first_update, return_mean
from tests.helpers.toy import run_updates
from tests.helpers.trick import Trick

TRICK = {
    "MissingEndPenalty": Trick(
        acts={"score": -1.0},
        refuses={"penalty": 1.0, "score": float("nan")},
        knobs={
            "penalty": tuple({"score": None, "penalty": penalty} for penalty in (1.0, 2.0)),
            "score": ({}, {"score": -2.0}),
        },
    )
}

SCORES = [3.0, 4.0, -5.0, 6.0, 7.0, 0.0, 9.0, -8.0]  # the toy's fourth and eighth response do not end


@pytest.mark.parametrize(
    ("arguments", "fourth", "eighth"),
    [
        ({"score": -1.0}, -1.0, -1.0),
        ({"score": 0.0}, 0.0, 0.0),
        ({"score": 2}, 2.0, 2.0),
        ({"penalty": 1.5}, 4.5, -9.5),
        ({"penalty": 10}, -4.0, -18.0),
    ],
)
def test_only_responses_without_an_end_are_judged_anew(arguments: dict[str, float], fourth: float, eighth: float):
    module = run_updates(MissingEndPenalty(**arguments), scores=lambda update: SCORES, kl_coef=0.0)
    (experience,) = module.experiences
    assert experience.scores.tolist() == [*SCORES[:3], fourth, *SCORES[4:7], eighth]
    assert experience.rewards.sum(1).tolist() == experience.scores.tolist()
    assert experience.raw_scores.tolist() == SCORES


@pytest.mark.parametrize("arguments", [{"score": -1.0}, {"penalty": 2.0}])
def test_returns_of_litppo_are_those_of_the_lowered_scores(tmp_path: Path, tiny_lm: Path, arguments: dict[str, float]):
    plain, before = first_update(tmp_path, tiny_lm)
    experience, row = first_update(tmp_path, tiny_lm, MissingEndPenalty(**arguments))
    ended, raw = plain.ended.tolist(), plain.raw_scores.tolist()
    assert 0 < sum(ended) < 7
    assert row["response/ended_fraction"] == pytest.approx(sum(ended) / 7)
    lowered = [
        score if end else arguments.get("score", score - arguments.get("penalty", 0.0))
        for score, end in zip(raw, ended, strict=True)
    ]
    assert row["value/return_mean"] == pytest.approx(return_mean(experience, lowered), rel=1e-5)
    assert row["value/return_mean"] < before["value/return_mean"] - 0.1


@pytest.mark.parametrize("arguments", [{}, {"penalty": 1.0, "score": -1.0}])
def test_exactly_one_of_the_two_is_given(arguments: dict[str, float]):
    with pytest.raises(ValueError, match=r"MissingEndPenalty\(penalty=.*, score=.*\): give exactly one of"):
        MissingEndPenalty(**arguments)


@pytest.mark.parametrize("penalty", [0.0, -1.0])
def test_penalty_must_be_positive(penalty: float):
    with pytest.raises(ValueError, match=r"MissingEndPenalty\(penalty="):
        MissingEndPenalty(penalty=penalty)
