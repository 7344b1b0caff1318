"""EntropyBonus: sign, size, and the target judged by the step before."""

from types import SimpleNamespace

import pytest
import torch

from lit_ppo.callbacks import EntropyBonus
from tests.helpers.experiences import make_micro_batch
from tests.helpers.spies import Spy
from tests.helpers.toy_runs import run_updates
from tests.helpers.trick import Trick

TRICK = {
    # the toy's entropy is over 1 nat, so the bonus acts in the very first step alone
    "EntropyBonus": Trick(
        acts={"coef": 0.5, "target": 1.0},
        refuses={"coef": float("nan"), "target": -1.0},
        knobs={"coef": ({}, {"coef": 0.1}), "target": ({}, {"target": None})},
    )
}


def test_loss_is_minus_coef_times_the_mean_entropy_of_response_tokens():
    """By hand: responses of 1 and 2 tokens with entropies 2 and (4, 9), mean 5; what is masked is NaN."""
    nan = float("nan")
    entropy = torch.tensor([[2.0, nan], [4.0, 9.0]]).requires_grad_()
    micro = make_micro_batch(torch.tensor([[True, False], [True, True]]), new_entropy=entropy)
    losses = {"policy": torch.tensor(1.0)}
    EntropyBonus(coef=0.1).on_actor_loss(None, None, micro, losses)
    assert {name: loss.item() for name, loss in losses.items()} == {"policy": 1.0, "entropy": pytest.approx(-0.5)}
    losses["entropy"].backward()
    assert entropy.grad.flatten().tolist() == pytest.approx([-0.1 / 3, 0.0, -0.1 / 3, -0.1 / 3])


@pytest.mark.parametrize(("entropy", "is_on"), [(2.0, True), (2.01, False)])
def test_off_above_the_target_by_the_entropy_of_the_step_before(entropy: float, is_on: bool):
    trick = EntropyBonus(coef=0.1, target=2.0)
    trick.on_minibatch_end(None, None, None, {"entropy": entropy})
    frozen = SimpleNamespace(actor_frozen=True)
    trick.on_minibatch_end(None, frozen, None, {"value_loss": 1.0})  # of a step without the actor, which says nothing
    trick.on_minibatch_end(None, None, None, {"entropy": float("nan")})  # of a step that is skipped
    losses: dict[str, torch.Tensor] = {}
    micro = make_micro_batch(torch.ones(1, 3, dtype=torch.bool), new_entropy=torch.zeros(1, 3))
    trick.on_actor_loss(None, None, micro, losses)
    assert ("entropy" in losses) == is_on


@pytest.mark.parametrize(("target", "later"), [(1.0, False), (None, True)])
def test_every_micro_batch_of_a_step_is_treated_alike(target: float | None, later: bool):
    """The toy's entropy is over 1: on in the first step, which has nothing to judge by, off in all later ones."""
    has_bonus = Spy("on_actor_loss", lambda module, micro, losses: "entropy" in losses)
    run_updates([EntropyBonus(coef=0.1, target=target), has_bonus], 2)
    micro_batches = 3  # a step has two and an empty one
    assert has_bonus.seen == [True] * micro_batches + [later] * 3 * micro_batches
