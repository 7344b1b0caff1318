"""EntropyBonus: sign, size, and the target judged by the step before."""

import math
from types import SimpleNamespace

import pytest
import torch

from lit_ppo.callbacks import CriticWarmup, EntropyBonus
from tests.helpers.toy import TOKENS, Spy, T, Toy, run_updates
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
    mask = torch.tensor([[True, False], [True, True]])
    micro = SimpleNamespace(
        new_entropy=torch.tensor([[2.0, nan], [4.0, 9.0]]), mean=lambda x: x.masked_fill(~mask, 0.0).sum() / 3
    )
    losses = {"policy": torch.tensor(1.0)}
    EntropyBonus(coef=0.1).on_actor_loss(None, None, micro, losses)
    assert losses["entropy"].item() == pytest.approx(-0.5)
    assert losses["policy"].item() == 1.0


def test_first_step_follows_the_derived_gradient():
    """A uniform policy has entropy log V and no gradient of it; off it, the step is lr * coef * dH/dlogits.

    With logits b at every position (features 0), dH/db_i = -p_i (log p_i + H).
    """
    module = Toy(scores=lambda update: [0.0] * 4, episodes=4, kl_coef=0.0, critic=False)
    module.actor.weight.data.zero_()
    module.actor.bias.data = torch.tensor([0.0, 0.5, -0.5, 1.0, 0.2])
    p = [math.exp(b) for b in module.actor.bias.tolist()]
    p = [x / sum(p) for x in p]
    entropy = -sum(x * math.log(x) for x in p)
    expected = [
        b - 0.05 * 0.3 * x * (math.log(x) + entropy) for b, x in zip(module.actor.bias.tolist(), p, strict=True)
    ]
    run_updates(EntropyBonus(coef=0.3), 1, module=module)
    assert module.losses[0]["entropy"] == pytest.approx(-0.3 * entropy, rel=1e-5)
    assert module.actor.bias.tolist() == pytest.approx(expected, rel=1e-5)


def test_entropy_rises_with_the_coefficient():
    entropies = [run_updates(EntropyBonus(coef), 4).steps[-1]["entropy"] for coef in (1e-9, 0.5, 5.0)]
    assert entropies[0] < entropies[1] < entropies[2] < math.log(TOKENS)


@pytest.mark.parametrize(("entropy", "is_on"), [(1.99, True), (2.0, True), (2.01, False)])
def test_off_above_the_target_by_the_entropy_of_the_step_before(entropy: float, is_on: bool):
    trick = EntropyBonus(coef=0.1, target=2.0)
    trick.on_minibatch_end(None, None, None, {"entropy": entropy})
    losses: dict[str, torch.Tensor] = {}
    trick.on_actor_loss(None, None, SimpleNamespace(new_entropy=torch.zeros(1, T), mean=torch.mean), losses)
    assert ("entropy" in losses) == is_on


def test_every_micro_batch_of_a_step_is_treated_alike():
    """The toy's entropy is over 1: on in the first step, which has nothing to judge by, off in all later ones."""
    has_bonus = Spy("on_actor_loss", lambda module, micro, losses: "entropy" in losses)
    run_updates([EntropyBonus(coef=0.1, target=1.0), has_bonus], 2)
    micro_batches = 3  # a step has two and an empty one
    assert has_bonus.seen == [True] * micro_batches + [False] * 3 * micro_batches


def test_without_a_target_it_stays_on():
    has_bonus = Spy("on_actor_loss", lambda module, micro, losses: "entropy" in losses)
    run_updates([EntropyBonus(coef=0.1), has_bonus], 2)
    assert has_bonus.seen == [True] * 12


def test_steps_without_an_actor_are_no_judge():
    trick = EntropyBonus(target=2.0)
    trick.on_minibatch_end(None, None, None, {"entropy": 3.0})
    trick.on_minibatch_end(None, None, None, {"value_loss": 1.0})
    assert trick.state_dict() == {"entropy": 3.0}
    assert len(run_updates([CriticWarmup(1), EntropyBonus(target=1.0)], 2).actors) == 2
