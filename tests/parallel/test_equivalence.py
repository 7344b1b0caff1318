"""One update on one process is the same update on two and three ranks, by every strategy."""

from typing import Any

import pytest
import torch

from tests.helpers.equivalence import CASES, Case, compare


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, Case], dict[str, Any]]:
    """Ranks are started once for all cases: that takes longer than the cases."""
    return compare(tmp_path_factory.mktemp("equivalence"))


@pytest.mark.parametrize(("n", "case"), [(n, case) for n, cases in CASES.items() for case in cases], ids=str)
def test_ranks_sample_learn_and_log_as_one_process(n, case, compared):
    """7 prompts, which neither 2 nor 3 ranks divide; plain SGD, unclipped; gradients and changes of every parameter.

    With tricks there are two updates; the second one's prompts, rates, reference and critic are what the first made
    them, and its second step is cancelled.
    """
    found = compared[n, case]
    one, many = found["one"], found["many"]
    assert len(one["lengths"]) > 2, "responses of one length show nothing"
    assert all(ours.equal(theirs) for ours, theirs in zip(many["samples"], one["samples"], strict=True))
    assert len(one["gradients"]) == (3 if case.features else 2)
    assert min(gradient.norm() for gradient in one["gradients"][0].values()) > 1e-5, "nothing to compare"
    assert found["gradients"] < 1e-5
    assert found["beyond_rounding"] < 1e-5
    assert found["all_but_two"] < 1e-5
    for name, weight in one["weights"].items():
        if name.startswith("reference"):
            torch.testing.assert_close(many["weights"][name], weight, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(many["logged"], one["logged"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if not name.startswith(("time/", "throughput/", "memory/")):
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    if case.features:
        first, second = one["logged"]
        assert (first["policy/early_stop"], second["policy/early_stop"]) == (0, 1)
        assert second["policy/lr"] == pytest.approx(1.5 * first["policy/lr"])
        start = {name: weight for name, weight in found["start"].items() if name.startswith("reference")}
        assert any(not one["weights"][name].equal(weight) for name, weight in start.items()) != case.fixed_reference
