"""DualClip: the bound, the share of tokens that it acts on, and a step worked by hand."""

import math
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from lit_ppo.callbacks import DualClip
from tests.helpers.experiences import make_micro_batch
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


# ratio, advantage -> gradient of the loss by the log-prob, with clip 0.2 and c = 2
TABLE = [
    (4.0, -1.0, 0.0),  # the bound acts: 2
    (4.0, -0.5, 0.0),  # and here: 1
    (1.5, -1.0, 1.5),  # 1.5
    (0.5, -1.0, 0.0),  # clipped: 0.8
    (4.0, 1.0, 0.0),  # clipped: -1.2
]


@pytest.mark.parametrize(
    ("clip_range", "loss"),
    [
        (0.2, (2 + 1 + 1.5 + 0.8 - 1.2) / 5),
        (None, (2 + 1 + 1.5 + 0.5 - 4) / 5),  # the module's clip range is the one that counts
        ([0.25, 0.5], (2 + 1 + 1.5 + 0.75 - 1.5) / 5),  # down to 0.75, up to 1.5
    ],
)
def test_loss_gradient_and_share_of_bounded_tokens(clip_range: Any, loss: float):
    """One response a line of the table, with a second, masked token that would spoil everything."""
    nan = float("nan")
    micro = make_micro_batch(
        torch.tensor([[True, False]] * 5),
        new_logprobs=torch.tensor([[math.log(ratio), nan] for ratio, _, _ in TABLE]).requires_grad_(),
        logprobs=torch.tensor([[0.0, nan]] * 5),
        advantages=torch.tensor([[advantage, nan] for _, advantage, _ in TABLE]),
    )
    losses = {"policy": torch.tensor(99.0)}
    DualClip(c=2.0).on_actor_loss(None, SimpleNamespace(clip_range=clip_range), micro, losses)
    assert losses.keys() == {"policy"}
    assert losses["policy"].item() == pytest.approx(loss, rel=1e-6)
    assert micro.logged == {"policy/dual_clip_fraction": pytest.approx(2 / 5)}
    losses["policy"].backward()
    gradients = [gradient / 5 for _, _, gradient in TABLE] if clip_range else [0.0, 0.0, 0.3, 0.1, -0.8]
    assert micro.new_logprobs.grad[:, 0].tolist() == pytest.approx(gradients, abs=1e-6)


class Moved(L.Callback):
    """The policy that sampled gave every token a fifth of its probability; every advantage is -1."""

    def on_advantages(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        experience.logprobs = (experience.logprobs - math.log(5.0)) * experience.response_mask
        experience.advantages = -1.0 * experience.response_mask


@pytest.mark.parametrize(("c", "loss", "fraction"), [(3.0, 3.0, 1.0), (6.0, 5.0, 0.0)])
def test_on_the_real_module(tmp_path, lm, c, loss, fraction):
    """Ratio 5 everywhere: the loss logged is 3 under a bound of 3, else 5, and only what is not bounded moves."""
    trainer = make_trainer(tmp_path, callbacks=[Moved(), DualClip(c)], max_steps=1)
    trainer.fit(make_module(lm, minibatch_size=7, ppo_epochs=1), make_data(tmp_path))
    (row,) = logged(trainer)
    assert row["policy/ratio"] == pytest.approx(5.0, rel=1e-4)
    assert row["policy/loss"] == pytest.approx(loss, rel=1e-4)
    assert row["policy/dual_clip_fraction"] == fraction
    assert (row["policy/grad_norm"] > 0) == (loss == 5.0)
