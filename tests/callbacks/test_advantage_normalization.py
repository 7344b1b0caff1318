"""AdvantageNormalization against moments taken with the standard library."""

import math
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_ppo.callbacks import AdvantageNormalization
from tests.helpers.spies import Spy
from tests.helpers.toy_runs import run_updates
from tests.helpers.trick import Trick

TRICK = {
    "AdvantageNormalization": Trick(
        acts={"clip": 0.5},
        refuses={"scope": "epoch", "clip": 0.0, "unbiased": 1},
        knobs={
            "scope": ({}, {"scope": "minibatch"}),
            "clip": ({}, {"clip": None}),
            "unbiased": ({}, {"unbiased": False}),
        },
        twice=True,
    )
}


def z_scores(values: list[float], clip: float) -> list[float]:
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return [min(max((value - mean) / deviation, -clip), clip) for value in values]


def advantages_of(*tricks: AdvantageNormalization) -> tuple[list[float], list[list[float]]]:
    """Advantages of response tokens in the first update: those of the batch, and those of each minibatch."""

    def look(module: Any, rows: Any) -> list[float]:
        values: list[float] = rows.advantages[rows.response_mask].tolist()
        return values

    batch, minibatches = Spy("on_advantages", look), Spy("on_minibatch_start", look)
    run_updates([*tricks, batch, minibatches])
    return batch.seen[0], minibatches.seen


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("scope", ["batch", "minibatch"])
def test_z_scores_over_the_scope_and_then_clipped(scope: Any, clip: float | None):
    """The moments of the batch leave minibatches their differences; those of minibatches leave the batch alone."""
    raw_batch, raw_minibatches = advantages_of()
    assert len(raw_minibatches) == 2
    batch, minibatches = advantages_of(AdvantageNormalization(scope, clip))
    bound = clip or math.inf
    if scope == "batch":
        expected = z_scores(raw_batch, bound)
        assert batch == pytest.approx(expected, rel=1e-4, abs=1e-5)
        expected_minibatches = [expected[:10], expected[10:]]  # each of 1 + 2 + 3 + 4 tokens
    else:
        assert batch == raw_batch
        expected_minibatches = [z_scores(values, bound) for values in raw_minibatches]
    for values, expected in zip(minibatches, expected_minibatches, strict=True):
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert clip is None or (min(values), max(values)) == pytest.approx((-0.7, 0.7))


def test_advantages_are_rebound_not_edited_in_place():
    rows: Any = SimpleNamespace(advantages=torch.tensor([[1.0, 2.0, 6.0]]), response_mask=torch.ones(1, 3).bool())
    before = rows.advantages
    AdvantageNormalization().on_advantages(None, None, rows)
    assert before.tolist() == [[1.0, 2.0, 6.0]] != rows.advantages.tolist()
