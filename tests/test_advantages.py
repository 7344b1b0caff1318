"""Estimators behind the protocol."""

import statistics
from types import SimpleNamespace

import pytest
import torch

from lit_ppo.advantages import GAE, AdvantageEstimator, GroupRelative, LeaveOneOut, Reinforce

NAN = float("nan")
MASK = torch.tensor([[True, True, True], [True, False, False]])
REWARDS = torch.tensor([[-0.1, -0.1, 4.9], [1.0, NAN, NAN]])
VALUES = torch.tensor([[2.0, 3.0, 4.0], [0.25, NAN, NAN]])


def experience(values: torch.Tensor | None = VALUES) -> SimpleNamespace:
    return SimpleNamespace(rewards=REWARDS, values=values, response_mask=MASK)


def test_gae_by_hand():
    """By default gamma 1 and lambda 0.95; with gamma 0.5 the deltas are 0.9, 2 - 3.1 = -1.1, 1.5 - 2.1 = -0.6."""
    advantages, returns = GAE()(experience())
    assert advantages.tolist() == [pytest.approx([2.56725, 1.755, 0.9]), pytest.approx([0.75, 0, 0])]
    assert returns.tolist() == [pytest.approx([4.56725, 4.755, 4.9]), pytest.approx([1.0, 0, 0])]
    advantages, _ = GAE(gamma=0.5, lam=0.25)(experience())
    carried = 0.5 * 0.25
    second = -1.1 + carried * 0.9
    assert advantages[0].tolist() == pytest.approx([-0.6 + carried * second, second, 0.9])


def test_the_critic_learns_with_a_lambda_of_its_own():
    """One-step advantages 3 - 2 - 0.1, 4 - 3 - 0.1, 4.9 - 4; the critic learns the sums of rewards to the end."""
    advantages, returns = GAE(lam=0.0, value_lam=1.0)(experience())
    assert advantages.tolist() == [pytest.approx([0.9, 0.9, 0.9]), pytest.approx([0.75, 0, 0])]
    assert returns.tolist() == [pytest.approx([4.7, 4.8, 4.9]), pytest.approx([1.0, 0, 0])]


@pytest.mark.parametrize(("name", "value"), [("gamma", -0.1), ("gamma", 1.1), ("lam", NAN), ("value_lam", 2.0)])
def test_arguments_lie_between_zero_and_one(name: str, value: float):
    with pytest.raises(
        ValueError, match=rf"GAE\({name}={value!r}\): must be a finite number, at least 0 and at most 1"
    ):
        GAE(**{name: value})


def test_experience_without_values_is_refused():
    with pytest.raises(ValueError, match="GAE: the experience has no values; give the module a critic"):
        GAE()(experience(values=None))


# without a critic


def test_group_relative_by_hand():
    """Scores 1, 2, 6: mean 3, deviations -2, -1, 3, variance 14 / 2; 10 and 12: mean 11, variance 2."""
    made = SimpleNamespace(
        scores=torch.tensor([1.0, 10.0, 2.0, 6.0, 12.0]),
        group=torch.tensor([5, 2, 5, 5, 2]),
        response_mask=torch.tensor([[True, True], [True, True], [True, False], [True, True], [True, False]]),
    )
    advantages, returns = GroupRelative()(made)
    a, b = 7**0.5, 2**0.5
    expected = [[-2 / a, -2 / a], [-1 / b, -1 / b], [-1 / a, 0], [3 / a, 3 / a], [1 / b, 0]]
    assert advantages.tolist() == [pytest.approx(row, rel=1e-6) for row in expected]
    assert returns is None
    unscaled, _ = GroupRelative(scale=False)(made)
    assert unscaled.tolist() == [[-2, -2], [-1, -1], [-1, 0], [3, 3], [1, 0]]


@pytest.mark.parametrize(
    ("estimator", "values", "groups", "rewards"),
    [
        (GAE(), True, False, True),
        (GroupRelative(), False, True, False),
        (LeaveOneOut(), False, True, True),
        (Reinforce(), False, False, True),
        (Reinforce(group_baseline=True), False, True, True),
    ],
)
def test_what_estimators_say_they_need(estimator: AdvantageEstimator, values: bool, groups: bool, rewards: bool):
    needs = (estimator.needs_values, estimator.needs_groups, estimator.needs_rewards)
    assert needs == (values, groups, rewards)


def test_text_forms_have_every_argument():
    estimators = GAE(0.5, 0.25), GroupRelative(False), LeaveOneOut(), Reinforce()
    assert repr(GAE(value_lam=1.0)) == "GAE(gamma=1.0, lam=0.95, value_lam=1.0)"
    texts = [repr(estimator) for estimator in estimators]
    assert texts[:3] == ["GAE(gamma=0.5, lam=0.25)", "GroupRelative(scale=False)", "LeaveOneOut()"]
    assert texts[3:] == ["Reinforce(group_baseline=False)"]


def test_scale_is_true_or_false():
    with pytest.raises(ValueError, match=r"GroupRelative\(scale='std'\): must be True or False"):
        GroupRelative(scale="std")


def test_the_group_baseline_is_the_mean_return_of_the_prompts_responses():
    """Returns 4.7 and 2.7 to one prompt, 1 and 6 to the other, of 3, 1, 1 and 2 tokens; whitened over the 7 tokens."""
    nan, t, f = NAN, True, False
    rewards = torch.tensor([[-0.1, -0.1, 4.9], [2.7, nan, nan], [1.0, nan, nan], [2.0, 4.0, nan]])
    mask = torch.tensor([[t, t, t], [t, f, f], [t, f, f], [t, t, f]])
    less = [[4.7 - 3.7, 4.8 - 3.7, 4.9 - 3.7], [2.7 - 3.7], [1.0 - 3.5], [6.0 - 3.5, 4.0 - 3.5]]
    flat = [x for row in less for x in row]
    mean, deviation = statistics.fmean(flat), statistics.stdev(flat)
    rows = SimpleNamespace(rewards=rewards, response_mask=mask, group=torch.tensor([3, 3, 1, 1]))
    advantages, returns = Reinforce(group_baseline=True)(rows)
    assert advantages[mask].tolist() == pytest.approx([(x - mean) / deviation for x in flat], rel=1e-5)
    assert returns is None
    assert (advantages[~mask] == 0).all()
