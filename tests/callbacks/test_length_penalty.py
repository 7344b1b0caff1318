"""LengthPenalty against numbers worked by hand."""

from pathlib import Path

import pytest

from lit_ppo.callbacks import LengthPenalty
from tests.helpers.first_update import first_update, return_mean
from tests.helpers.toy import run_updates
from tests.helpers.trick import Trick

TRICK = {
    "LengthPenalty": Trick(
        acts={"budget": 2, "coef": 0.5, "max_penalty": 0.75},
        refuses={"budget": -1, "coef": 0.0, "max_penalty": -1.0},
        knobs={
            "budget": ({}, {"budget": 1}),
            "coef": ({}, {"coef": 0.25}),
            "max_penalty": ({}, {"max_penalty": None}),
        },
    )
}

SCORES = [3.0, 4.0, -5.0, 6.0, 7.0, 0.0, 9.0, -8.0]  # of the toy's responses of 1, 2, 3, 4, 1, 2, 3, 4 tokens


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        ({"budget": 2, "coef": 0.5}, [0.0, 0.0, 0.5, 1.0]),
        ({"budget": 2, "coef": 0.5, "max_penalty": 0.75}, [0.0, 0.0, 0.5, 0.75]),
        ({"budget": 0, "coef": 2.0}, [2.0, 4.0, 6.0, 8.0]),
        ({"budget": 4, "coef": 2.0}, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_each_token_over_the_budget_costs(arguments: dict[str, float], taken: list[float]):
    module = run_updates(LengthPenalty(**arguments), scores=lambda update: SCORES, kl_coef=0.0)
    (experience,) = module.experiences
    assert experience.scores.tolist() == [score - off for score, off in zip(SCORES, taken * 2, strict=True)]
    assert experience.rewards.sum(1).tolist() == experience.scores.tolist()
    assert experience.raw_scores.tolist() == SCORES
    assert module.trainer.logged_metrics["reward/length_penalty"].item() == pytest.approx(sum(taken) / 4)


def test_there_is_no_bound_by_default():
    module = run_updates(LengthPenalty(0, 1e6), scores=lambda update: SCORES)
    assert module.experiences[0].scores[3].item() == 6.0 - 4e6


def test_returns_of_litppo_are_those_of_the_lowered_scores(tmp_path: Path, tiny_lm: Path):
    plain, before = first_update(tmp_path, tiny_lm)
    lengths, raw = plain.response_mask.sum(1).tolist(), plain.raw_scores.tolist()
    budget = sorted(lengths)[2]
    experience, row = first_update(tmp_path, tiny_lm, LengthPenalty(budget, coef=0.3, max_penalty=1.0))
    taken = [0.0 if n <= budget else min(0.3 * (n - budget), 1.0) for n in lengths]
    assert 0.0 in taken
    assert max(taken) > 0.5
    lowered = [score - off for score, off in zip(raw, taken, strict=True)]
    assert row["reward/length_penalty"] == pytest.approx(sum(taken) / 7, rel=1e-5)
    assert row["value/return_mean"] == pytest.approx(return_mean(experience, lowered), rel=1e-5)
    assert row["value/return_mean"] < before["value/return_mean"] - 0.1
