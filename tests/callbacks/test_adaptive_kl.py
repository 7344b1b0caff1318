"""AdaptiveKL against coefficients worked by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_ppo.callbacks import AdaptiveKL, CriticWarmup
from tests.helpers.toy import Toy
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import logged, make_data, make_module, make_trainer
from tests.helpers.trick import Trick

TRICK = {
    "AdaptiveKL": Trick(
        acts={"target": 0.9, "horizon": 10, "final_target": 1.2, "decay_updates": 4},
        refuses={"target": 0.0, "horizon": -1, "per": "episode", "final_target": 0.0, "decay_updates": 0},
        knobs={
            "target": ({}, {"target": 1.0}),
            "horizon": ({}, {"horizon": 20}),
            "per": ({}, {"per": "token"}),
            "final_target": ({}, {"final_target": 1.0}),
            "decay_updates": ({}, {"decay_updates": 2}),
        },
        needs="reference",
    )
}


def test_coefficient_follows_the_published_controller():
    """An error of 1, clipped to 0.2; 0.2 * 256 / 10000 = 0.00512."""
    trick = AdaptiveKL(target=6.0, horizon=10_000)
    module = run_updates(trick, 2, kl_per_response=12.0, episodes=256, minibatch_size=256, kl_coef=0.15)
    assert module.kl_coefs == pytest.approx([0.15 * 1.00512, 0.15 * 1.00512**2], rel=1e-6)
    assert "objective/kl_target" not in module.trainer.logged_metrics  # it does not change


@pytest.mark.parametrize(
    ("per", "target", "factor"),
    [
        ("response", 3.0, 1.0),
        ("token", 1.0, 1.2),  # 24 nats over 20 tokens: 0.2 over the target, times 8 / 8
        ("token", 1.25, 0.96),
    ],
)
def test_kl_is_summed_over_each_response_or_averaged_over_all_tokens(per: Any, target: float, factor: float):
    """Lengths 1 to 4 twice, at 3 nats each."""
    module = run_updates(AdaptiveKL(target, horizon=8, per=per), episodes=8, kl_per_response=3.0, kl_coef=0.1)
    assert module.kl_coefs == pytest.approx([0.1 * factor], rel=1e-6)


@pytest.mark.parametrize("turn", [1, -1])
def test_coefficient_and_target_wait_while_the_actor_is_frozen(turn: int):
    """KL 0.9: after the warm-up the first update still aims at 1, an error of -0.1; then at 0.5, 0.8 clipped to 0.2."""
    tricks = [CriticWarmup(2), AdaptiveKL(target=1.0, horizon=8, final_target=0.5, decay_updates=1)]
    module = run_updates(tricks[::turn], 4, episodes=8, kl_per_response=0.9, kl_coef=0.1)
    assert module.kl_coefs == pytest.approx([0.1, 0.1, 0.1 * 0.9, 0.1 * 0.9 * 1.2], rel=1e-6)


def test_on_litppo_the_logged_coefficient_and_target_move(tmp_path: Path, tiny_lm: Path):
    """12 prompts in batches of 7 and 5. KL 0 at first: -1, clipped; 0.2 * 7 / 70 = 0.02; then far under the target."""
    trick = AdaptiveKL(target=1e-4, horizon=70, final_target=1e3, decay_updates=1)
    trainer = make_trainer(tmp_path, callbacks=[trick], max_steps=3)
    trainer.fit(make_module(tiny_lm, kl_estimator="k3", kl_coef=0.5), make_data(tmp_path))
    rows = logged(trainer)
    coefficients = [0.5, 0.5 * 0.98, 0.5 * 0.98 * (1 - 1 / 70)]  # 0.2 * 5 / 70
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx(coefficients)
    assert [row["objective/kl_target"] for row in rows] == pytest.approx([1e-4, 1e3, 1e3])


def test_resume_before_the_first_update_keeps_the_modules_coefficient():
    trick = AdaptiveKL()
    trick.load_state_dict(AdaptiveKL().state_dict())
    module = Toy(kl_coef=0.3)
    trick.on_train_start(None, module)
    assert module.kl_coef == 0.3


def test_an_update_that_is_not_finite_leaves_the_coefficient():
    trick, module = AdaptiveKL(target=1.0, horizon=8), Toy(kl_coef=0.3)
    experience = SimpleNamespace(kl=torch.tensor([[1.0, float("nan")]]), response_mask=torch.ones(1, 2).bool())
    trick.on_update_end(None, module, experience)
    assert module.kl_coef == 0.3
    assert trick.state_dict() == AdaptiveKL().state_dict()


def test_coefficient_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"AdaptiveKL multiplies kl_coef, which has no effect on Toy\(kl_coef=0.0\)"):
        run_updates(AdaptiveKL(), kl_coef=0.0)
