"""KLEarlyStop: which step is the last, and that the one which finds the KL too large is not taken."""

from typing import Any

import lightning as L
import pytest
import torch

from lit_ppo.callbacks import CriticWarmup, KLEarlyStop
from tests.helpers.recorder import record
from tests.helpers.spies import Spy
from tests.helpers.toy import TwoUpdates
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import logged
from tests.helpers.trick import Trick

TRICK = {
    # the toy's second step of an update finds a KL, its first has none
    "KLEarlyStop": Trick(acts={"target": 1e-6}, refuses={"target": 0.0}, knobs={"target": ({}, {"target": 1e3})})
}


class Given(L.Callback):
    """Puts given numbers in place of the KL that each optimizer step finds."""

    def __init__(self, *kl: float) -> None:
        self.kl = list(kl)

    def on_minibatch_end(self, trainer: Any, pl_module: Any, experience: Any, metrics: dict[str, float]) -> None:
        metrics["approx_kl"] = self.kl.pop(0)


@pytest.mark.parametrize(
    ("kl", "taken"),
    [
        ([0.0, 0.010, 0.0151, 0.012], 2),  # the third finds it over 0.015 and is not taken, nor is the fourth
        ([0.0, 0.010, 0.0150, 0.012], 4),  # at the level is not over it
        ([0.02, 0.0, 0.0, 0.0], 0),
        ([0.0, float("nan"), 0.02, 0.0], 2),  # what is not finite is the module's to skip
    ],
)
def test_steps_taken(kl: list[float], taken: int):
    """Two passes of two minibatches are four steps; actor and critic stand where so many plain steps leave them."""
    at_each_step = Spy("on_minibatch_end", lambda module, *_: [p.clone() for p in module.parameters()])
    run_updates(at_each_step, ppo_epochs=3)
    module = run_updates([Given(*kl), KLEarlyStop(0.015)], ppo_epochs=2)
    torch.testing.assert_close([*module.parameters()], at_each_step.seen[taken], rtol=0, atol=0)
    assert module.experiences[0].exhausted == (taken < 4)
    assert module.trainer.callback_metrics["policy/early_stop"].item() == float(taken < 4)


def test_every_update_is_judged_anew():
    """Stopped, not stopped, stopped: the log says so update by update."""
    kl = Given(1.0, *[0.0] * 2, 0.0, 1.0)
    stopped = Spy("on_train_batch_end", lambda module, *_: module.trainer.callback_metrics["policy/early_stop"].item())
    module = run_updates([kl, KLEarlyStop(0.5), stopped], 3)
    assert stopped.seen == [1.0, 0.0, 1.0]
    assert len(module.steps) == 1 + 2 + 2


def test_another_update_of_the_same_rollout_takes_no_step():
    """The policy that sampled is still too far away."""
    module = run_updates([Given(0.0, 1.0), KLEarlyStop(0.5)], module=TwoUpdates())
    assert len(module.steps) == 2


def test_a_frozen_actor_has_no_kl_and_the_critic_learns_on():
    module = run_updates([CriticWarmup(1), KLEarlyStop(1e-9)], ppo_epochs=2)
    assert len(module.steps) == 4
    assert all("approx_kl" not in step for step in module.steps)


def test_litppos_update_ends_before_the_step_whose_kl_is_over_the_target(tmp_path, lm):
    """Up to there its steps are those of the plain run."""
    options = {"ppo_epochs": 4, "max_steps": 1}
    plain = [metrics["approx_kl"] for metrics in record(tmp_path, lm, **options)[1].metrics]
    assert len(plain) == 8  # four passes of 5 and 2 rows
    target = 0.9 * max(plain)
    last = next(i for i, kl in enumerate(plain) if kl > target)
    assert 2 <= last < 7
    _, recorder, trainer = record(tmp_path, lm, KLEarlyStop(target), **options)
    ours = [metrics["approx_kl"] for metrics in recorder.metrics]
    assert ours == plain[: last + 1]
    (row,) = logged(trainer)
    assert row["policy/early_stop"] == 1.0
    assert row["policy/approx_kl"] == pytest.approx(sum(ours) / len(ours), rel=1e-6)
