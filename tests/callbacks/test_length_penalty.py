"""LengthPenalty against numbers worked by hand."""

import pytest

from lit_ppo.callbacks import LengthPenalty
from tests.helpers.toy_runs import scores_after
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
        ({"budget": 2, "coef": 0.5, "max_penalty": 0.75}, [0.0, 0.0, 0.5, 0.75]),
        ({"budget": 0, "coef": 1e6}, [1e6, 2e6, 3e6, 4e6]),
    ],
)
def test_each_token_over_the_budget_costs(arguments: dict[str, float], taken: list[float]):
    (scores,), logged = scores_after(LengthPenalty(**arguments), SCORES)
    assert scores == [score - off for score, off in zip(SCORES, taken * 2, strict=True)]
    assert logged["reward/length_penalty"] == pytest.approx(sum(taken) / 4)
