"""CriticWarmup: N freezes exactly N; a level that is reached ends it sooner; passes are put back."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_ppo.callbacks import CriticWarmup
from tests.helpers.spies import Spy
from tests.helpers.toy import Toy, TwoUpdates
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import logged, make_data, make_module, make_trainer
from tests.helpers.trick import Trick

TRICK = {
    "CriticWarmup": Trick(
        acts={"updates": 3},
        refuses={"updates": 0, "value_loss": 0.0, "explained_variance": 1.0, "ppo_epochs": 0},
        knobs={
            "updates": ({}, {"updates": 2}),
            # the toy's first update has 16.2, and 0.034
            "value_loss": ({}, {"value_loss": 17.0}),
            "explained_variance": ({}, {"explained_variance": 0.03}),
            "ppo_epochs": ({}, {"ppo_epochs": 2}),
        },
        needs="critic",
    )
}


def moves(module: Toy, start: torch.Tensor) -> list[bool]:
    """Whether the actor moved in each update."""
    weights = [start, *module.actors]
    return [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]


START = Toy().actor.weight.detach().clone()


@pytest.mark.parametrize("updates", [1, 3])
def test_exactly_n_updates_are_frozen_and_the_critic_learns_meanwhile(updates: int):
    module = run_updates(CriticWarmup(updates), 4)
    assert moves(module, START) == [False] * updates + [True] * (4 - updates)
    assert ["policy" in losses for losses in module.losses[::2]] == moves(module, START)
    critics = [Toy().critic.weight, *module.critics]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(critics))


def test_two_updates_of_one_rollout_count_as_two_and_both_have_more_passes():
    module = run_updates(CriticWarmup(3, ppo_epochs=3), 2, module=TwoUpdates())
    assert moves(module, START) == [False, False, False, True]
    assert len(module.steps) == 3 * 6 + 2
    assert module.ppo_epochs == 1


def test_a_fit_that_ends_or_fails_meanwhile_leaves_nothing_set():
    """A second one without the callback trains the actor, with the module's own passes."""

    def fail(module: Toy, experience: Any) -> None:
        raise RuntimeError("no more")

    for spies in ([], [Spy("on_rewards", fail)]):
        module, tricks = Toy(), [CriticWarmup(5, ppo_epochs=3), *spies]
        with pytest.raises(RuntimeError, match="no more") if spies else nullcontext():
            run_updates(tricks, 2, module=module)
        assert not any(moves(module, START))
        module.updates.zero_()
        n_steps = len(module.steps)
        run_updates([], 1, module=module)
        assert moves(module, START)[-1]
        assert len(module.steps) - n_steps == 2


def test_leaves_the_switch_alone_afterwards():
    """Another callback may freeze the actor later."""
    module = Toy()
    freeze = Spy("on_update_end", lambda module, experience: setattr(module, "actor_frozen", len(module.actors) == 2))
    run_updates([CriticWarmup(1), freeze], 5, module=module)
    assert moves(module, START) == [False, True, True, False, True]


class Given(L.Callback):
    """Puts given value losses in place of those of each optimizer step, and values that explain so much of each update.

    Half the returns leave a quarter of their variance: 0.75 is explained; zeros explain nothing. What lies outside the
    responses would spoil it.
    """

    def __init__(self, losses: Any = (), halves: Any = ()) -> None:
        self.losses, self.halves = list(losses), list(halves)

    def on_advantages(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        if self.halves:
            values = (0.5 if self.halves.pop(0) else 0.0) * experience.returns
            experience.values = values.masked_fill(~experience.response_mask, 1e3)

    def on_minibatch_end(self, trainer: Any, pl_module: Any, experience: Any, metrics: dict[str, float]) -> None:
        if self.losses:
            metrics["value_loss"] = self.losses.pop(0)


@pytest.mark.parametrize(
    ("losses", "frozen"),
    [
        ([2.0, 4.5, 4.0, 2.0, 9.0, 9.0, 9.0, 9.0], 2),  # 3.25, then 3: at the level is enough; it does not begin again
        ([9.0, 1.0, 9.0, 1.0, 9.0, 1.0, 3.0, 3.0], 4),  # the mean of two steps, neither the last nor the least
        ([float("nan"), 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0], 2),  # a step that was skipped says nothing
    ],
)
def test_ends_after_the_update_whose_mean_value_loss_is_at_the_level(losses: list[float], frozen: int):
    module = run_updates([Given(losses), CriticWarmup(value_loss=3.0)], 4)
    assert moves(module, START) == [False] * frozen + [True] * (4 - frozen)


@pytest.mark.parametrize(("level", "frozen"), [(0.74, 2), (0.76, 4)])
def test_ends_after_the_update_whose_values_explained_enough(level: float, frozen: int):
    module = run_updates([Given(halves=[False, True, False, False]), CriticWarmup(explained_variance=level)], 4)
    assert moves(module, START) == [False] * frozen + [True] * (4 - frozen)


def test_returns_that_are_all_alike_say_nothing():
    tricks = [Given(halves=[True] * 3), CriticWarmup(explained_variance=0.5)]
    module = run_updates(tricks, 3, episodes=4, kl_coef=0.0, scores=lambda update: [2.0] * 4)
    assert moves(module, START) == [False] * 3


@pytest.mark.parametrize(
    ("arguments", "frozen"),
    [
        ({"updates": 3, "value_loss": 3.0, "explained_variance": 0.7}, 1),
        ({"updates": 3, "value_loss": 1.0, "explained_variance": 0.7}, 2),
        ({"updates": 3, "value_loss": 1.0, "explained_variance": 0.9}, 3),
    ],
)
def test_whatever_is_reached_first_ends_it(arguments: dict[str, Any], frozen: int):
    """The loss is 3 from the first update on; the second explains 0.75."""
    given = Given([3.0] * 8, halves=[False, True, False, False])
    assert moves(run_updates([given, CriticWarmup(**arguments)], 4), START) == [False] * frozen + [True] * (4 - frozen)


@pytest.mark.parametrize("silent", [None, "on_rollout_start", "on_rewards"])
def test_more_passes_meanwhile(silent: str | None):
    """Two steps a pass: three passes in each of two frozen updates, then the module's own one; either hook suffices."""
    steps = Spy("on_update_end", lambda module, experience: len(module.steps))
    ppo_epochs = Spy("on_train_batch_end", lambda module, *_: module.ppo_epochs)
    module = run_updates([CriticWarmup(2, ppo_epochs=3), steps, ppo_epochs], 4, fires=lambda hook: hook != silent)
    assert moves(module, START) == [False, False, True, True]
    assert steps.seen == [6, 12, 14, 16]
    assert ppo_epochs.seen == [1] * 4  # between updates it is the module's own


def test_a_run_resumed_in_mid_warm_up_ends_with_the_constructors_passes(tmp_path: Path):
    def steps_of(updates: int, ppo_epochs: int, **paths: Path) -> list[int]:
        steps = Spy("on_update_end", lambda module, experience: len(module.steps))
        module = run_updates([CriticWarmup(2, ppo_epochs=3), steps], updates, ppo_epochs=ppo_epochs, **paths)
        assert module.ppo_epochs == ppo_epochs
        return steps.seen

    assert steps_of(1, 2, save=tmp_path / "last.ckpt") == [6]
    assert steps_of(4, 1, resume=tmp_path / "last.ckpt") == [6, 8, 10]


def test_what_litppo_logs_decides(tmp_path, lm):
    """The actor learns from the update after the one whose ``value/loss`` or explained variance is at the level."""

    def rows_of(updates: int, trick: CriticWarmup) -> list[dict[str, float]]:
        trainer = make_trainer(tmp_path, callbacks=[Given(halves=[False, True, False]), trick], max_steps=updates)
        trainer.fit(make_module(lm), make_data(tmp_path))
        return logged(trainer)

    first, second = rows_of(2, CriticWarmup(4))
    assert first["value/loss"] > second["value/loss"]
    explained = [row["value/explained_variance"] for row in (first, second)]
    assert explained == pytest.approx([0.0, 0.75], abs=1e-5)
    for level in ({"value_loss": second["value/loss"] * (1 + 1e-6)}, {"explained_variance": 0.74}):
        assert ["policy/loss" in row for row in rows_of(3, CriticWarmup(**level))] == [False, False, True]
