"""ReferenceUpdate against weights and a KL worked by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_ppo.callbacks import ReferenceUpdate
from tests.helpers.toy import Toy
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import logged, make_data, make_module, make_trainer
from tests.helpers.trick import Trick

TRICK = {
    "ReferenceUpdate": Trick(
        acts={"every": 2},
        refuses={"every": 0, "decay": 0.5},
        knobs={
            "every": ({}, {"every": 3}),
            "decay": tuple({"every": None, "decay": decay} for decay in (0.5, 0.9)),
        },
        needs="reference",
    )
}


def test_copies_every_few_updates_and_stays_in_between():
    module = run_updates(ReferenceUpdate(every=2), 4)
    start = Toy().reference.weight
    followed = [start, module.actors[1], module.actors[1], module.actors[3]]
    assert all(reference.equal(expected) for reference, expected in zip(module.references, followed, strict=True))
    assert not module.actors[1].equal(module.actors[3])
    assert module.reference.bias.equal(module.actor.bias)
    assert not module.reference.bias.equal(Toy().reference.bias)
    assert not any(parameter.requires_grad for parameter in module.reference.parameters())


def test_moving_average_is_the_written_out_sum():
    """After three updates with decay d: d^3 r0 + (1 - d) (d^2 a1 + d a2 + a3)."""
    module, d = run_updates(ReferenceUpdate(decay=0.75), 3), 0.75
    a1, a2, a3 = module.actors
    expected = d**3 * Toy().reference.weight + (1 - d) * (d**2 * a1 + d * a2 + a3)
    torch.testing.assert_close(module.references[-1], expected, rtol=1e-6, atol=1e-7)


class WithoutAdapter(nn.Module):
    """A reference that is the actor itself, with something switched off."""

    def __init__(self, actor: nn.Module) -> None:
        super().__init__()
        self.actor = actor


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        (lambda module: WithoutAdapter(module.actor), "they share weight, so there is no second copy to move"),
        (lambda module: nn.Linear(3, 7), r"weight is \(5, 3\) in the actor, \(7, 3\) in"),
        (lambda module: nn.Linear(3, 5, bias=False), r"bias is \(5,\) in the actor, missing in the reference"),
        (lambda module: object(), "missing in the reference"),
        (lambda module: nn.Linear(3, 5).bfloat16(), "is in torch.bfloat16, .*; use reference_dtype='float32'"),
    ],
)
def test_a_reference_that_cannot_follow_is_refused_before_the_first_rollout(reference: Any, why: str):
    module = Toy()
    del module.reference
    module.reference = reference(module)
    with pytest.raises(ValueError, match=f"ReferenceUpdate cannot move Toy's reference to its actor: .*{why}"):
        run_updates(ReferenceUpdate(every=1), module=module)
    assert module.experiences == []


def test_litppos_kl_starts_at_0_after_each_copy(tmp_path: Path, lm: Path):
    """Exactly: the reference is the policy that samples."""
    trainer = make_trainer(tmp_path, callbacks=[ReferenceUpdate(every=2)], max_steps=4)
    trainer.fit(make_module(lm, kl_estimator="k3"), make_data(tmp_path))
    first, second, third, fourth = (row["objective/kl"] for row in logged(trainer))
    assert first == third == 0.0
    assert min(second, fourth) > 1e-4
