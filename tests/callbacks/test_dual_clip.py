"""DualClip: the bound, the share of tokens that it acts on, and a step worked by hand."""

import math
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from lit_ppo.callbacks import DualClip
from tests.helpers.toy import Toy, run_updates
from tests.helpers.toys import logged, make_data, make_module, make_trainer
from tests.helpers.trick import Trick

TRICK = {
    "DualClip": Trick(
        acts={"c": 1.001},
        refuses={"c": 1.0},
        knobs={"c": ({}, {"c": 1.01})},
        # scores below the critic's values: every advantage is negative
        toy={"scores": lambda update: [-3.0, -5.0, -2.0, -8.0, -4.0, -6.0, -1.0, -7.0]},
    )
}

# ratio, advantage -> loss with clip 0.2 and c = 2, whether the bound acts, gradient of the loss by the log-prob
TABLE = [
    (4.0, -1.0, 2.0, True, 0.0),
    (4.0, -0.5, 1.0, True, 0.0),
    (1.5, -1.0, 1.5, False, 1.5),
    (0.5, -1.0, 0.8, False, 0.0),
    (4.0, 1.0, -1.2, False, 0.0),
]


def micro_batch() -> SimpleNamespace:
    """One response a line of the table, with a second, masked token that would spoil everything."""
    n, nan = len(TABLE), float("nan")
    mask = torch.tensor([[True, False]] * n)
    logged: dict[str, float] = {}
    return SimpleNamespace(
        new_logprobs=torch.tensor([[math.log(row[0]), nan] for row in TABLE]).requires_grad_(),
        logprobs=torch.tensor([[0.0, nan]] * n),
        advantages=torch.tensor([[row[1], nan] for row in TABLE]),
        mean=lambda x: x.masked_fill(~mask, 0.0).sum() / n,
        log=lambda name, x: logged.update({name: (x.masked_fill(~mask, 0.0).sum() / n).item()}),
        logged=logged,
    )


def test_loss_gradient_and_share_of_bounded_tokens():
    """(2 + 1 + 1.5 + 0.8 - 1.2) / 5 = 0.82; two of five tokens are bounded."""
    micro, losses = micro_batch(), {"policy": torch.tensor(99.0)}
    DualClip(c=2.0).on_actor_loss(None, SimpleNamespace(clip_range=0.2), micro, losses)
    assert losses.keys() == {"policy"}
    assert losses["policy"].item() == pytest.approx(0.82, rel=1e-6)
    assert micro.logged == {"policy/dual_clip_fraction": pytest.approx(2 / 5)}
    losses["policy"].backward()
    assert micro.new_logprobs.grad[:, 0].tolist() == pytest.approx([row[4] / 5 for row in TABLE], abs=1e-6)


def test_the_modules_clip_range_is_the_one_in_force():
    """Without one the last token's loss is -4 in place of -1.2, and the fourth's 0.5 in place of 0.8."""
    losses: dict[str, torch.Tensor] = {}
    DualClip(c=2.0).on_actor_loss(None, SimpleNamespace(clip_range=None), micro_batch(), losses)
    assert losses["policy"].item() == pytest.approx((2 + 1 + 1.5 + 0.5 - 4) / 5, rel=1e-6)


def test_two_sides_of_clipping():
    """A ratio may go down to 0.75 and up to 1.5: the fourth token's loss is 0.75, the last one's -1.5."""
    losses: dict[str, torch.Tensor] = {}
    DualClip(c=2.0).on_actor_loss(None, SimpleNamespace(clip_range=[0.25, 0.5]), micro_batch(), losses)
    assert losses["policy"].item() == pytest.approx((2 + 1 + 1.5 + 0.75 - 1.5) / 5, rel=1e-6)


def test_a_bound_that_is_never_reached_changes_nothing():
    bounded, plain = run_updates(DualClip(1e6), 3), run_updates([], 3)
    assert [step["policy/dual_clip_fraction"] for step in bounded.steps] == [0.0] * 6
    for ours, theirs in zip(bounded.actors, plain.actors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_papers_bound_is_the_default():
    assert DualClip().c == 3.0


def test_module_without_a_clip_range_is_refused_before_the_first_rollout():
    module = Toy()
    del module.clip_range
    with pytest.raises(TypeError, match="DualClip needs clip_range on the module, which Toy lacks"):
        run_updates(DualClip(), module=module)
    assert module.experiences == []


class Moved(L.Callback):
    """The policy that sampled gave every token a fifth of its probability; every advantage is -1 or all are 1."""

    def __init__(self, advantage: float) -> None:
        self.advantage = advantage

    def on_advantages(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        experience.logprobs = (experience.logprobs - math.log(5.0)) * experience.response_mask
        experience.advantages = self.advantage * experience.response_mask


@pytest.mark.parametrize(
    ("c", "advantage", "loss", "fraction"),
    [(3.0, -1.0, 3.0, 1.0), (6.0, -1.0, 5.0, 0.0), (3.0, 1.0, -1.2, 0.0)],
)
def test_on_the_real_module(tmp_path, lm, c, advantage, loss, fraction):
    """Ratio 5 everywhere: the loss logged is 3 under a bound of 3, else 5, and only what is not bounded moves."""
    module = make_module(lm, minibatch_size=7, ppo_epochs=1)
    trainer = make_trainer(tmp_path, callbacks=[Moved(advantage), DualClip(c)], max_steps=1)
    trainer.fit(module, make_data(tmp_path))
    (row,) = logged(trainer)
    assert row["policy/ratio"] == pytest.approx(5.0, rel=1e-4)
    assert row["policy/loss"] == pytest.approx(loss, rel=1e-4)
    assert row["policy/dual_clip_fraction"] == fraction
    assert (row["policy/grad_norm"] > 0) == (loss == 5.0)
