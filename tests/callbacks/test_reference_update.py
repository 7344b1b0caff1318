"""ReferenceUpdate against weights and a KL worked by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_ppo.callbacks import ReferenceUpdate
from lit_ppo.run.checkpoint import StepCheckpoint
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toy import Spy, Toy, run_updates
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
    module = run_updates(ReferenceUpdate(every=2), 5)
    start = Toy().reference.weight
    followed = [start, module.actors[1], module.actors[1], module.actors[3], module.actors[3]]
    assert all(reference.equal(expected) for reference, expected in zip(module.references, followed, strict=True))
    assert not module.actors[1].equal(module.actors[3])
    assert not any(parameter.requires_grad for parameter in module.reference.parameters())


def test_moving_average_is_the_written_out_sum():
    """After three updates with decay d: d^3 r0 + (1 - d) (d^2 a1 + d a2 + a3)."""
    module, d = run_updates(ReferenceUpdate(decay=0.75), 3), 0.75
    a1, a2, a3 = module.actors
    expected = d**3 * Toy().reference.weight + (1 - d) * (d**2 * a1 + d * a2 + a3)
    torch.testing.assert_close(module.references[-1], expected, rtol=1e-6, atol=1e-7)


def test_biases_move_too():
    module = run_updates(ReferenceUpdate(every=1))
    assert module.reference.bias.equal(module.actor.bias)
    assert not module.reference.bias.equal(Toy().reference.bias)


@pytest.mark.parametrize("arguments", [{}, {"every": 2, "decay": 0.9}])
def test_exactly_one_of_every_and_decay(arguments: dict[str, Any]):
    with pytest.raises(ValueError, match=r"ReferenceUpdate\(every=.*, decay=.*\): give exactly one of every and decay"):
        ReferenceUpdate(**arguments)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, True])
def test_decay_lies_between_0_and_1(decay: float):
    with pytest.raises(ValueError, match=rf"ReferenceUpdate\(decay={decay!r}\): must be a finite number, above 0 and "):
        ReferenceUpdate(decay=decay)


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
        (lambda module: nn.ModuleDict({"base": nn.Linear(3, 5)}), "weight is .* in the actor, missing in"),
        (lambda module: object(), "missing in the reference"),
        (
            lambda module: nn.Linear(3, 5).bfloat16(),
            "the reference is in torch.bfloat16, which rounds small changes away",
        ),
    ],
)
def test_a_reference_that_cannot_follow_is_refused_before_the_first_rollout(reference: Any, why: str):
    module = Toy()
    del module.reference
    module.reference = reference(module)
    with pytest.raises(ValueError, match=f"ReferenceUpdate cannot move Toy's reference to its actor: .*{why}"):
        run_updates(ReferenceUpdate(every=1), module=module)
    assert module.experiences == []


# On LitPPO


def fit(folder: Path, actor: Path, *tricks: Any, updates: int = 4, ckpt_path: Path | None = None, **model: Any) -> Any:
    module = make_module(actor, **model)
    callbacks = [*tricks, StepCheckpoint(1, 9, str(folder / "saved"))]
    trainer = make_trainer(folder, callbacks=callbacks, max_steps=updates, enable_checkpointing=True)
    trainer.fit(module, make_data(folder), ckpt_path=ckpt_path, weights_only=False)
    return module, logged(trainer)


@pytest.mark.parametrize(("every", "at_zero"), [(1, [True, True, True, True]), (2, [True, False, True, False])])
def test_the_kl_starts_at_0_after_each_copy(tmp_path: Path, lm: Path, every: int, at_zero: list[bool]):
    """Exactly: the reference is the policy that samples. Without the trick it is 0 in the first update alone."""
    _, rows = fit(tmp_path, lm, ReferenceUpdate(every=every), kl_estimator="k3")
    assert [row["objective/kl"] == 0.0 for row in rows] == at_zero
    assert all(row["objective/kl"] > 1e-4 for row, zero in zip(rows, at_zero, strict=True) if not zero)
    _, rows = fit(tmp_path / "..", lm, kl_estimator="k3")
    assert [row["objective/kl"] == 0.0 for row in rows] == [True, False, False, False]


def test_a_moving_average_shrinks_the_next_kl_by_the_square_of_its_decay(tmp_path: Path, lm: Path):
    """One short step d away: the reference goes 1 - decay of it, decay * d is left, and k2 is half its square."""
    small = {"kl_estimator": "k2", "actor_optimizer": lambda params: torch.optim.SGD(params, lr=1e-3)}
    (_, plain), (_, moved) = (
        fit(tmp_path, lm, *tricks, updates=2, **small) for tricks in ([], [ReferenceUpdate(decay=0.8)])
    )
    assert plain[1]["objective/kl"] > 1e-9
    assert moved[1]["objective/kl"] / plain[1]["objective/kl"] == pytest.approx(0.64, rel=0.02)


@pytest.mark.parametrize("arguments", [{"every": 2}, {"decay": 0.6}])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, lm: Path, arguments: dict[str, Any], stop: int):
    whole, rows = fit(tmp_path, lm, ReferenceUpdate(**arguments))
    again, rest = fit(tmp_path, lm, ReferenceUpdate(**arguments), ckpt_path=tmp_path / f"saved/step-{stop:06d}.ckpt")
    assert [row["objective/kl"] for row in rest] == [row["objective/kl"] for row in rows[stop:]]
    state = whole.state_dict()
    assert any(name.startswith("reference.") for name in state)
    assert all(value.equal(again.state_dict()[name]) for name, value in state.items())


def test_a_reference_in_bfloat16_is_refused_with_what_to_do(tmp_path: Path, lm: Path):
    seen = Spy("on_rollout_start", lambda module, prompts: None)
    with pytest.raises(ValueError, match=r"ReferenceUpdate cannot move LitPPO's .* use reference_dtype='float32'"):
        fit(tmp_path, lm, ReferenceUpdate(every=1), seen, reference_dtype="bfloat16")
    assert seen.seen == []


def test_a_reference_of_another_size_is_refused(tmp_path: Path, lm: Path):
    other = make_causal_lm(tmp_path / "other", n_embd=8)
    with pytest.raises(ValueError, match=r"LitPPO's reference to its actor: model\..* is \(.*, 16\)"):
        fit(tmp_path, lm, ReferenceUpdate(decay=0.9), reference=str(other))
