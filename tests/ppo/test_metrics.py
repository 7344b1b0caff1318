"""What an update reports, by hand: small numbers in, small numbers out."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_ppo.experience import Minibatch
from lit_ppo.ppo.metrics import current_coefficients, forget_last_update, log_policy, of_experience, of_steps
from lit_ppo.ppo.optimize import NonFiniteError, Optimization
from tests.helpers.experiences import make_experience


def experience() -> Any:
    """Two responses of 1 and 3 tokens; a trick has turned the scores 1 and 5 into -1 and 1."""
    made = make_experience(lengths=(1, 3), prompts=(2, 1))
    made.logprobs = torch.tensor([[-1.0, 0.0, 0.0], [-1.0, -2.0, -4.0]])
    made.ref_logprobs = None
    made.kl = torch.tensor([[0.5, 0.0, 0.0], [0.5, 1.0, 2.0]])
    made.raw_scores, made.scores = torch.tensor([1.0, 5.0]), torch.tensor([-1.0, 1.0])
    made.values = torch.tensor([[1.0, 0.0, 0.0], [2.0, 3.0, 6.0]])
    made.returns = torch.tensor([[2.0, 0.0, 0.0], [2.0, 4.0, 8.0]])
    made.advantages = made.returns - made.values
    made.ended = torch.tensor([False, True])
    return made


def test_numbers_of_an_experience():
    """KL 0.5 and 3.5 a response, four tokens in all; returns vary by 6, their errors 1, 0, 1, 2 by 0.5."""
    assert of_experience(experience(), kl_coef=0.5) == {
        "objective/score": 3.0,
        "objective/score_std": 2.0,
        "objective/kl": 2.0,
        "objective/rlhf_reward": 2.0,  # 1 - 0.25 and 5 - 1.75, of the scores as they were given
        "objective/entropy": 4.0,
        "response/length": 2.0,
        "response/ended_fraction": 0.5,
        "value/explained_variance": pytest.approx(1 - 0.5 / 6),
        "value/mean": 3.0,
        "value/return_mean": 4.0,
    }


def test_without_values_none_are_logged():
    for lacking in ("values", "returns"):
        made = experience()
        setattr(made, lacking, None)
        assert not [name for name in of_experience(made, 0.5) if name.startswith("value/")]


@pytest.mark.parametrize(("clip_range", "clipped"), [(0.25, 0.5), (0.6, 0.25), (None, 0.0)])
def test_numbers_of_a_step_are_of_its_tokens(clip_range: float | None, clipped: float):
    """Ratios of 1, and 1, 2 and 1/2; beside them what no mask lets in. KL by k3: ratio - 1 - log ratio."""
    minibatch = Minibatch.of(experience(), range(2), "token_mean")
    moved = torch.tensor([[0.0, 9.0, 9.0], [0.0, math.log(2), -math.log(2)]])
    minibatch.new_logprobs = (minibatch.logprobs + moved).requires_grad_()
    minibatch.new_entropy = torch.tensor([[1.0, 9.0, 9.0], [1.0, 2.0, 4.0]])
    log_policy(minibatch, clip_range)
    found = {name: float(value) for name, value in minibatch.metrics.items()}
    assert found == {
        "approx_kl": pytest.approx((2 - 1 - math.log(2) + 0.5 - 1 + math.log(2)) / 4),
        "ratio": pytest.approx(4.5 / 4),
        "clip_fraction": clipped,
        "entropy": 2.0,
    }
    assert [float(x) for x in minibatch.least.values()] == [pytest.approx(0.5)]
    assert [float(x) for x in minibatch.greatest.values()] == [pytest.approx(2.0)]
    assert not any(value.requires_grad for value in minibatch.metrics.values())


def test_numbers_of_an_update_are_means_over_the_steps_that_have_them():
    """The second of three steps was skipped; a loss that only the last one has is that one's."""
    skipped = "optimizer/skipped_fraction"
    steps = [
        {"policy_loss": 1.0, "ratio_min": 0.5, "ratio_max": 1.5, "value_loss": 4.0, skipped: 0.0},
        {"policy_loss": math.nan, "ratio_min": 0.1, "ratio_max": 9.0, "value_loss": 7.0, skipped: 1.0},
        {"policy_loss": 2.0, "ratio_min": 0.7, "ratio_max": 1.2, "value_loss": 2.0, "kl_loss": 3.0, skipped: 0.0},
    ]
    means = {"policy/loss": 1.5, "policy/ratio_min": 0.5, "policy/ratio_max": 1.5, "value/loss": 3.0, "kl_loss": 3.0}
    assert of_steps(steps) == {**means, "value/clip_fraction": 0.0, skipped: pytest.approx(1 / 3)}
    assert of_steps([{"value_loss": 1.0, "value/clip_fraction": 0.25, skipped: 0.0}])["value/clip_fraction"] == 0.25
    assert of_steps([{"policy_loss": 1.0}]) == {"policy/loss": 1.0, skipped: 0.0}  # cancelled before it was taken
    assert of_steps([{"policy_loss": math.nan, skipped: 1.0}]) == {skipped: 1.0}
    assert of_steps([]) == {}


def test_learning_rates_are_those_of_the_first_group():
    optimizers: Any = [SimpleNamespace(param_groups=[{"lr": lr}, {"lr": 9.0}]) for lr in (0.25, 0.5)]
    assert current_coefficients(0.125, optimizers) == {"objective/kl_coef": 0.125, "policy/lr": 0.25, "value/lr": 0.5}
    assert current_coefficients(0.125, optimizers[:1]) == {"objective/kl_coef": 0.125, "policy/lr": 0.25}


def test_the_error_of_a_failed_step_has_the_batchs_numbers():
    """Losses and gradient norms, not other metrics; two steps were skipped before, which was allowed."""
    optimization = Optimization("LitPPO", max_grad_norm=None, max_skipped_steps=2)
    optimization.skipped_steps = 2
    metrics = {"policy_loss": math.nan, "value_loss": 0.5, "ratio": 1.0}
    with pytest.raises(NonFiniteError) as info:
        optimization.step(SimpleNamespace(rollouts=7), metrics, experience())
    assert str(info.value).startswith(
        "update 7: policy_loss=nan, value_loss=0.5 is not finite; 2 responses of up to 3 tokens, scores -1 to 1, "
        "KL 0 to 2, advantages 0 to 2; 3 optimizer steps in a row (max_skipped_steps=2); "
    )


def test_only_what_the_step_has_logged_for_itself_is_forgotten():
    """Not the mean over an epoch, of which a part is there, nor what a hook between two steps has said."""
    forgotten: list[str] = []

    def logged(name: str, fx: str, on_epoch: bool) -> Any:
        return SimpleNamespace(meta=SimpleNamespace(fx=fx, on_epoch=on_epoch), reset=lambda: forgotten.append(name))

    rows = [
        logged("step", "training_step", False),
        logged("epoch", "training_step", True),
        logged("hook", "on_train_batch_start", False),
    ]
    forget_last_update(SimpleNamespace(_results=SimpleNamespace(result_metrics=rows)))
    assert forgotten == ["step"]
