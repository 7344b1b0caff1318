"""AdvantageNormalization against moments taken with the standard library."""

import statistics

import pytest
import torch

from lit_ppo.callbacks import AdvantageNormalization
from tests.helpers.toy import Rows, Spy, run_updates
from tests.helpers.trick import Trick

TRICK = {
    "AdvantageNormalization": Trick(
        acts={"clip": 0.5},
        refuses={"scope": "epoch", "clip": 0.0},
        knobs={"scope": ({}, {"scope": "minibatch"}), "clip": ({}, {"clip": None})},
        twice=True,
    )
}


def response_tokens(rows: Rows) -> list[float]:
    return rows.advantages[rows.response_mask].tolist()


def z_scores(values: list[float]) -> list[float]:
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return [(value - mean) / deviation for value in values]


def advantages_of(trick: AdvantageNormalization | None, hook: str) -> list[list[float]]:
    """Advantages of response tokens that the hook's later listeners see in the first update."""
    spy = Spy(hook, lambda module, rows: response_tokens(rows))
    run_updates([spy] if trick is None else [trick, spy])
    return spy.seen


@pytest.mark.parametrize(("scope", "hook"), [("batch", "on_advantages"), ("minibatch", "on_minibatch_start")])
def test_z_scores_over_the_scope(scope: str, hook: str):
    raw = advantages_of(None, hook)
    expected = [z_scores(values) for values in raw]
    seen = advantages_of(AdvantageNormalization(scope), hook)
    assert len(seen) == {"batch": 1, "minibatch": 2}[scope]
    for values, right in zip(seen, expected, strict=True):
        assert values == pytest.approx(right, rel=1e-4, abs=1e-5)


def test_batch_scope_leaves_minibatches_their_differences():
    first, second = advantages_of(AdvantageNormalization("batch"), "on_minibatch_start")
    assert statistics.fmean(first) == pytest.approx(-statistics.fmean(second), abs=1e-5)  # as many tokens each
    assert abs(statistics.fmean(first)) > 0.01


def test_minibatch_scope_leaves_the_experience_alone():
    assert advantages_of(AdvantageNormalization("minibatch"), "on_advantages") == advantages_of(None, "on_advantages")


@pytest.mark.parametrize(("scope", "hook"), [("batch", "on_advantages"), ("minibatch", "on_minibatch_start")])
def test_clip_comes_after(scope: str, hook: str):
    for values, raw in zip(
        advantages_of(AdvantageNormalization(scope, clip=0.7), hook), advantages_of(None, hook), strict=True
    ):
        expected = [min(max(z, -0.7), 0.7) for z in z_scores(raw)]
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert min(values) == pytest.approx(-0.7)
        assert max(values) == pytest.approx(0.7)


@pytest.mark.parametrize("hook", ["on_advantages", "on_minibatch_start"])
def test_what_lies_outside_the_responses_changes_nothing(hook: str):
    """Padding filled with NaN, and more of it, gives the same numbers; masked entries become 0."""
    scope = "batch" if hook == "on_advantages" else "minibatch"
    mask = torch.tensor([[True, False, False], [True, True, False]])
    advantages = torch.tensor([[1.0, float("nan"), 7.0], [2.0, 6.0, float("inf")]])
    rows = type("Rows", (), {"advantages": advantages, "response_mask": mask})()
    getattr(AdvantageNormalization(scope), hook)(None, None, rows)
    z = z_scores([1.0, 2.0, 6.0])
    assert rows.advantages.flatten().tolist() == pytest.approx([z[0], 0, 0, z[1], z[2], 0], abs=1e-6)
    assert advantages[0, 2] == 7.0  # rebound, not edited in place
