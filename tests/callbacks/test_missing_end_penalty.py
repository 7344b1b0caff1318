"""MissingEndPenalty against numbers worked by hand."""

import pytest

from lit_ppo.callbacks import MissingEndPenalty
from tests.helpers.toy_runs import scores_after
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
    [({"score": -1.0}, -1.0, -1.0), ({"score": 0}, 0.0, 0.0), ({"penalty": 1.5}, 4.5, -9.5)],
)
def test_only_responses_without_an_end_are_judged_anew(arguments: dict[str, float], fourth: float, eighth: float):
    (scores,), _ = scores_after(MissingEndPenalty(**arguments), SCORES)
    assert scores == [*SCORES[:3], fourth, *SCORES[4:7], eighth]
