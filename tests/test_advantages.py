"""Estimators behind the protocol."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from lit_ppo.advantages import GAE, AdvantageEstimator

NAN = float("nan")
MASK = torch.tensor([[True, True, True], [True, False, False]])
REWARDS = torch.tensor([[-0.1, -0.1, 4.9], [1.0, NAN, NAN]])
VALUES = torch.tensor([[2.0, 3.0, 4.0], [0.25, NAN, NAN]])


def experience(values: torch.Tensor | None = VALUES) -> SimpleNamespace:
    return SimpleNamespace(rewards=REWARDS, values=values, response_mask=MASK)


def test_gae_worked_example():
    estimator: AdvantageEstimator = GAE(gamma=1.0, lam=0.95)
    advantages, returns = estimator(experience())
    assert advantages.tolist() == [pytest.approx([2.56725, 1.755, 0.9]), pytest.approx([0.75, 0, 0])]
    assert returns.tolist() == [pytest.approx([4.56725, 4.755, 4.9]), pytest.approx([1.0, 0, 0])]
    assert estimator.needs_values


def test_defaults_are_those_of_the_worked_example():
    torch.testing.assert_close(GAE()(experience()), GAE(1.0, 0.95)(experience()), rtol=0, atol=0)


def test_gamma_and_lam_by_hand():
    # deltas 0.9, 0.5 * 4 - 0.1 - 3 = -1.1, 0.5 * 3 - 0.1 - 2 = -0.6; each adds half of gamma times the next
    advantages, _ = GAE(gamma=0.5, lam=0.5)(experience())
    assert advantages[0].tolist() == pytest.approx([-0.6 + 0.25 * (-1.1 + 0.25 * 0.9), -1.1 + 0.25 * 0.9, 0.9])


def test_lam_of_zero_and_one():
    assert GAE(lam=0.0)(experience())[0][0].tolist() == pytest.approx([0.9, 0.9, 0.9])
    assert GAE(lam=1.0)(experience())[1][0].tolist() == pytest.approx([4.7, 4.8, 4.9])


@pytest.mark.parametrize("name", ["gamma", "lam"])
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN])
def test_arguments_lie_between_zero_and_one(name: str, value: float):
    with pytest.raises(ValueError, match=rf"GAE\({name}={value!r}\): must lie in \[0, 1\]"):
        GAE(**{name: value})


def test_experience_without_values_is_refused():
    with pytest.raises(ValueError, match="GAE: the experience has no values; give the module a critic"):
        GAE()(experience(values=None))


def test_text_form_has_every_argument():
    assert repr(GAE(0.5, 0.25)) == "GAE(gamma=0.5, lam=0.25)"
    assert list(inspect.signature(GAE).parameters) == ["gamma", "lam"]
