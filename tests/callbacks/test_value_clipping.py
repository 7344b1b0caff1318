"""ValueClipping against a table worked by hand."""

from types import SimpleNamespace

import pytest
import torch

from lit_ppo.callbacks import ValueClipping
from tests.helpers.toy import Toy, run_updates
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


def micro_batch() -> SimpleNamespace:
    """One response a line of the table, with a second, masked token that would spoil everything."""
    n, nan = len(TABLE), float("nan")
    mask = torch.tensor([[True, False]] * n)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor([[value, nan] for value in values])

    logged: dict[str, float] = {}
    return SimpleNamespace(
        new_values=column([row[0] for row in TABLE]).requires_grad_(),
        values=column([1.0] * n),
        returns=column([row[1] for row in TABLE]),
        mean=lambda x: x.masked_fill(~mask, 0.0).sum() / n,
        log=lambda name, x: logged.update({name: (x.masked_fill(~mask, 0.0).sum() / n).item()}),
        logged=logged,
    )


def test_loss_is_the_larger_of_the_two():
    micro, losses = micro_batch(), {"value": torch.tensor(99.0)}
    ValueClipping(clip_range=0.2).on_critic_loss(None, None, micro, losses)
    assert losses.keys() == {"value"}
    assert losses["value"].item() == pytest.approx((0.405 + 0.32 + 1.125 + 0.32 + 0.045) / 5, rel=1e-6)


def test_clipped_tokens_get_no_gradient():
    micro, losses = micro_batch(), {}
    ValueClipping(clip_range=0.2).on_critic_loss(None, None, micro, losses)
    losses["value"].backward()
    expected = [0.0 if clipped else (new - target) / 5 for new, target, _, clipped in TABLE]
    assert micro.new_values.grad[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_fraction_of_clipped_tokens_is_logged():
    micro = micro_batch()
    ValueClipping(clip_range=0.2).on_critic_loss(None, None, micro, {})
    assert micro.logged == {"value/clip_fraction": pytest.approx(2 / 5)}


def test_narrow_range_holds_the_critic_back():
    """The first step of an update clips nothing (values are the old ones); the second does."""
    wide, narrow = (run_updates(ValueClipping(clip_range)) for clip_range in (1e6, 1e-3))
    assert [step["value/clip_fraction"] for step in wide.steps] == [0.0, 0.0]
    assert narrow.steps[0]["value/clip_fraction"] == 0.0
    assert narrow.steps[1]["value/clip_fraction"] > 0.5
    start = Toy().critic.weight
    assert (narrow.critics[0] - start).norm() < (wide.critics[0] - start).norm()


def test_wide_range_is_the_plain_loss():
    clipped, plain = run_updates(ValueClipping(1e6), 2), run_updates([], 2)
    assert [losses["value"] for losses in clipped.losses] == pytest.approx([losses["value"] for losses in plain.losses])


def test_the_usual_range_is_the_default():
    assert ValueClipping().clip_range == 0.2
