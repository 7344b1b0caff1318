"""LearningRateAdaptation against rates worked by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_ppo.callbacks import CriticWarmup, LearningRateAdaptation
from tests.helpers.toy import Spy, Toy, run_updates
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
        ([0.0, 0.0101], 0.06),  # 0.00505, just over its half
        ([0.0, 0.0099], 0.06 * 1.5),
        ([0.0, 0.0], 0.06),  # nothing was measured
        ([1e-11], 0.06),  # nor here, but for rounding
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
    trick.on_minibatch_end(None, module, None, {"value_loss": 1.0})
    trick.on_update_end(None, module, None)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, 10 * rate])
    trick.on_update_end(None, module, None)  # nothing new
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_rate_stays_within_its_bounds():
    """From 0.05 by 1.5: 0.075, then 0.1125 is over 0.1; downwards 0.0333, then 0.0222 is under 0.03."""

    def rates(target: float) -> list[float]:
        at_end = Spy("on_update_end", lambda module, experience: module.actor_optimizer.param_groups[0]["lr"])
        run_updates([LearningRateAdaptation(target, minimum=0.03, maximum=0.1), at_end], 3)
        return at_end.seen

    assert rates(1e3) == pytest.approx([0.075, 0.1, 0.1])
    assert rates(1e-9) == pytest.approx([0.05 / 1.5, 0.03, 0.03])


def test_the_actors_steps_are_as_long_as_the_rate_and_the_critics_are_not():
    """The second update starts where it does without the trick; its actor goes 1.5 times as far in its first step."""

    def first_steps(tricks: list[Any]) -> list[Any]:
        steps = Spy("on_minibatch_end", lambda module, *_: (module.actor.weight.clone(), module.critic.weight.clone()))
        run_updates([*tricks, steps], 2)
        return [after - before for before, after in zip(steps.seen[2], steps.seen[3], strict=True)]

    (actor, critic), (plain_actor, plain_critic) = (
        first_steps(tricks) for tricks in ([LearningRateAdaptation(1e3, **BOUNDS)], [])
    )
    torch.testing.assert_close(actor, 1.5 * plain_actor, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(critic, plain_critic, rtol=1e-4, atol=1e-7)


def test_rests_while_the_actor_is_frozen():
    at_end = Spy("on_update_end", lambda module, experience: module.actor_optimizer.param_groups[0]["lr"])
    run_updates([CriticWarmup(2), LearningRateAdaptation(1e3, **BOUNDS), at_end], 3)
    assert at_end.seen == pytest.approx([0.05, 0.05, 0.075])


def test_defaults():
    trick = LearningRateAdaptation(0.01)
    assert (trick.factor, trick.minimum, trick.maximum) == (1.5, 1e-7, 1e-4)


def test_a_start_out_of_bounds_is_refused_with_both_named():
    module = Toy()
    with pytest.raises(ValueError, match=r"LearningRateAdaptation\(minimum=1e-07, maximum=0.0001\): .* Toy is 0.05"):
        run_updates(LearningRateAdaptation(0.01), module=module)
    assert module.experiences == []


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"Adaptation\(minimum=0.1\): must be a finite number, above 0 and below 0.1"):
        LearningRateAdaptation(0.01, minimum=0.1, maximum=0.1)


# On LitPPO


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def fit(folder: Path, actor: Path, target: float, updates: int = 4, ckpt_path: Path | None = None, **model: Any) -> Any:
    module = make_module(actor, **{"actor_optimizer": adam, **model})
    trainer = make_trainer(folder, callbacks=[LearningRateAdaptation(target, **BOUNDS)], max_steps=updates)
    trainer.fit(module, make_data(folder), ckpt_path=ckpt_path, weights_only=False)
    trainer.save_checkpoint(folder / f"{updates}.ckpt")
    return module, logged(trainer)


@pytest.mark.parametrize(
    ("target", "rates"),
    [(1e3, [0.01, 0.015, 0.0225, 0.03375]), (1e-7, [0.01, 0.01 / 1.5, 0.01 / 1.5**2, 0.01 / 1.5**3])],
)
def test_the_logged_rate_moves_by_the_factor(tmp_path: Path, lm: Path, target: float, rates: list[float]):
    _, rows = fit(tmp_path, lm, target)
    assert [row["policy/lr"] for row in rows] == pytest.approx(rates)
    assert [row["value/lr"] for row in rows] == pytest.approx([0.1] * 4)


def test_the_logged_kl_is_the_one_that_decides(tmp_path: Path, lm: Path):
    """The band around the KL of the first update: from half of it to twice of it, and no further."""
    kl = fit(tmp_path, lm, 1e3, updates=1)[1][0]["policy/approx_kl"]
    for target, rate in [(1.98 * kl, 0.01), (2.02 * kl, 0.015), (0.505 * kl, 0.01), (0.495 * kl, 0.01 / 1.5)]:
        assert fit(tmp_path, lm, target, updates=2)[1][1]["policy/lr"] == pytest.approx(rate)


def test_updates_of_a_single_step_say_nothing(tmp_path: Path, lm: Path):
    """The KL before the first step is 0, whatever that step will do."""
    _, rows = fit(tmp_path, lm, 0.01, updates=3, ppo_epochs=1, minibatch_size=7)
    assert [row["policy/lr"] for row in rows] == pytest.approx([0.01] * 3)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_goes_on_with_the_adapted_rate(tmp_path: Path, lm: Path, stop: int):
    whole, rows = fit(tmp_path, lm, 1e3)
    fit(tmp_path, lm, 1e3, updates=stop)
    again, rest = fit(tmp_path, lm, 1e3, ckpt_path=tmp_path / f"{stop}.ckpt")
    assert [row["policy/lr"] for row in rest] == [row["policy/lr"] for row in rows[stop:]]
    assert all(value.equal(again.state_dict()[name]) for name, value in whole.state_dict().items())


def halve(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


def test_a_schedule_of_the_actors_is_refused_the_critics_is_not(tmp_path: Path, lm: Path):
    message = r"LearningRateAdaptation and LitPPO\(actor_scheduler=ExponentialLR\): both would set the actor's learning"
    module = make_module(lm, actor_scheduler=halve)
    trainer = make_trainer(tmp_path, callbacks=[LearningRateAdaptation(0.01, **BOUNDS)])
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, make_data(tmp_path))
    assert module.rollouts == 0
    _, rows = fit(tmp_path, lm, 1e3, updates=2, critic_scheduler=halve)
    assert [row["value/lr"] for row in rows] == pytest.approx([0.1, 0.05])
