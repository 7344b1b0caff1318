"""ValueClipping against a table worked by hand."""

import pytest
import torch

from lit_ppo.callbacks import ValueClipping
from tests.helpers.experiences import make_micro_batch
from tests.helpers.toy_runs import run_updates
from tests.helpers.trick import Trick

TRICK = {
    "ValueClipping": Trick(
        acts={"clip_range": 0.1},
        refuses={"clip_range": float("inf")},
        knobs={"clip_range": ({}, {"clip_range": 0.2})},
        needs="critic",
    )
}


# old value 1, clip 0.2: new value, return -> half the larger squared error, whether the clipped one is larger
TABLE = [
    (1.1, 2.0, 0.405, False),  # inside: 0.9^2 / 2
    (1.5, 2.0, 0.32, True),  # clipped to 1.2: 0.8^2 / 2 over 0.5^2 / 2
    (0.5, 2.0, 1.125, False),  # moved away: 1.5^2 / 2 over 1.2^2 / 2
    (0.5, 0.0, 0.32, True),  # clipped to 0.8: 0.8^2 / 2 over 0.5^2 / 2
    (1.5, 1.2, 0.045, False),  # the clipped value would be right: 0.3^2 / 2 over 0
]


def test_loss_is_the_larger_of_the_two_and_clipped_tokens_get_no_gradient():
    """One response a line of the table, with a second, masked token that would spoil everything."""
    new, returns, _, _ = (
        torch.tensor([[value, float("nan")] for value in column]) for column in zip(*TABLE, strict=True)
    )
    micro = make_micro_batch(
        torch.tensor([[True, False]] * 5), new_values=new.requires_grad_(), values=torch.ones(5, 2), returns=returns
    )
    losses = {"value": torch.tensor(99.0)}
    ValueClipping(clip_range=0.2).on_critic_loss(None, None, micro, losses)
    assert losses.keys() == {"value"}
    assert losses["value"].item() == pytest.approx((0.405 + 0.32 + 1.125 + 0.32 + 0.045) / 5, rel=1e-6)
    assert micro.logged == {"value/clip_fraction": pytest.approx(2 / 5)}
    losses["value"].backward()
    expected = [0.0 if clipped else (value - target) / 5 for value, target, _, clipped in TABLE]
    assert new.grad[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_rounding_is_no_clipping():
    """Values moved by less than the range: a clipped value differs from the new one in its last bit, if at all."""
    new = 0.03 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    old = new + 0.01 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(1))
    micro = make_micro_batch(torch.ones(1000, 1, dtype=torch.bool), new_values=new, values=old, returns=old + 0.05)
    assert (old + (new - old) != new).any()
    ValueClipping(clip_range=0.2).on_critic_loss(None, None, micro, {})
    assert micro.logged == {"value/clip_fraction": 0.0}


def test_in_the_first_step_of_an_update_nothing_is_clipped():
    """Values are then those of the rollout."""
    fractions = [step["value/clip_fraction"] for step in run_updates(ValueClipping(1e-3)).steps]
    assert fractions[0] == 0.0
    assert fractions[1] > 0.5
