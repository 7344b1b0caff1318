"""LearningRateAdaptation against rates worked by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_ppo.callbacks import LearningRateAdaptation
from tests.helpers.toy import Toy
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import logged, make_data, make_module, make_trainer
from tests.helpers.trick import Trick

BOUNDS = {"minimum": 1e-3, "maximum": 1.0}
TRICK = {
    "LearningRateAdaptation": Trick(
        acts={"target": 1e3, "minimum": 0.01, "maximum": 0.1},
        refuses={"target": 0.0, "factor": 1.0, "minimum": 0.2, "maximum": -1.0},
        knobs={
            "target": ({}, {"target": 1e-9}),
            "factor": ({}, {"factor": 1.2}),
            "minimum": tuple({"target": 1e-9, "minimum": minimum} for minimum in (0.01, 0.04)),
            "maximum": ({}, {"maximum": 0.2}),
        },
    )
}


@pytest.mark.parametrize(
    ("kls", "rate"),
    [
        ([0.0, 0.041], 0.06 / 1.5),  # a mean of 0.0205, over twice the target
        ([0.0, 0.039], 0.06),  # 0.0195
        ([0.0, 0.0099], 0.06 * 1.5),  # 0.00495, under its half
        ([], 0.06),  # the actor was frozen
        ([0.0, float("inf")], 0.06 / 1.5),
        ([0.0, float("nan")], 0.06),
    ],
)
def test_rate_after_an_update(kls: list[float], rate: float):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.06)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.6})
    module: Any = SimpleNamespace(actor_optimizer=optimizer)
    trick = LearningRateAdaptation(0.01, **BOUNDS)
    for kl in kls:
        trick.on_minibatch_end(None, module, None, {"approx_kl": kl, "entropy": 1.0})
    module.actor_frozen = True
    trick.on_minibatch_end(None, module, None, {"value_loss": 1.0})
    trick.on_update_end(None, module, None)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, 10 * rate])
    trick.on_update_end(None, module, None)  # nothing new
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_a_start_out_of_bounds_is_refused_with_both_named():
    module = Toy()
    with pytest.raises(ValueError, match=r"LearningRateAdaptation\(minimum=1e-07, maximum=0.0001\): .* Toy is 0.05"):
        run_updates(LearningRateAdaptation(0.01), module=module)
    assert module.experiences == []


# On LitPPO


def halve(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


def fit(folder: Path, actor: Path, target: float, updates: int = 2, **model: Any) -> list[dict[str, float]]:
    module = make_module(actor, actor_optimizer=lambda params: torch.optim.AdamW(params, lr=0.01), **model)
    trainer = make_trainer(folder, callbacks=[LearningRateAdaptation(target, **BOUNDS)], max_steps=updates)
    trainer.fit(module, make_data(folder))
    return logged(trainer)


def test_the_logged_kl_moves_the_logged_rate(tmp_path: Path, lm: Path):
    """Up by the factor below half the target, and no sooner; down above twice the target."""
    rows = fit(tmp_path, lm, 1e3, updates=3)
    assert [row["policy/lr"] for row in rows] == pytest.approx([0.01, 0.015, 0.0225])
    assert [row["value/lr"] for row in rows] == pytest.approx([0.1] * 3)
    kl = rows[0]["policy/approx_kl"]
    for target, rate in [(1.98 * kl, 0.01), (0.495 * kl, 0.01 / 1.5)]:
        assert fit(tmp_path, lm, target)[1]["policy/lr"] == pytest.approx(rate)


def test_an_update_of_a_single_step_says_nothing_and_the_critic_keeps_its_schedule(tmp_path: Path, lm: Path):
    """The KL before the first step is 0, whatever that step will do."""
    rows = fit(tmp_path, lm, 0.01, ppo_epochs=1, minibatch_size=7, critic_scheduler=halve)
    assert [row["policy/lr"] for row in rows] == pytest.approx([0.01] * 2)
    assert [row["value/lr"] for row in rows] == pytest.approx([0.1, 0.05])


def test_a_schedule_of_the_actors_is_refused(tmp_path: Path, lm: Path):
    module = make_module(lm, actor_scheduler=halve)
    trainer = make_trainer(tmp_path, callbacks=[LearningRateAdaptation(0.01, **BOUNDS)])
    with pytest.raises(ValueError, match=r"Adaptation and LitPPO\(actor_scheduler=ExponentialLR\): .* keep one"):
        trainer.fit(module, make_data(tmp_path))
    assert module.rollouts == 0
