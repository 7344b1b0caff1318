"""CriticWarmup: N freezes exactly N."""

import itertools
from pathlib import Path

import pytest
import torch

from lit_ppo.callbacks import CriticWarmup
from tests.callbacks.toy import Rows, Spy, Toy, run_updates
from tests.callbacks.trick import Trick

TRICK = {
    "CriticWarmup": Trick(
        acts={"updates": 3}, refuses={"updates": 0}, knobs={"updates": ({}, {"updates": 2})}, needs="critic"
    )
}


def moves(module: Toy, start: torch.Tensor) -> list[bool]:
    """Whether the actor moved in each update."""
    weights = [start, *module.actors]
    return [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]


START = Toy().actor.weight.detach().clone()


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_exactly_n_updates_are_frozen(updates: int):
    module = run_updates(CriticWarmup(updates), 4)
    assert moves(module, START) == [False] * updates + [True] * (4 - updates)
    assert ["policy" in losses for losses in module.losses[::2]] == moves(module, START)


def test_critic_learns_meanwhile():
    module = run_updates(CriticWarmup(2), 2)
    critics = [Toy().critic.weight, *module.critics]
    assert not torch.equal(critics[0], critics[1])
    assert not torch.equal(critics[1], critics[2])


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_before_at_and_after_the_end(stop: int, tmp_path: Path):
    before = run_updates(CriticWarmup(2), stop, save=tmp_path / "last.ckpt")
    after = run_updates(CriticWarmup(2), 5, resume=tmp_path / "last.ckpt")
    assert moves(before, START) + moves(after, before.actors[-1]) == [False, False, True, True, True]


@pytest.mark.parametrize("silent", ["on_rollout_start", "on_rewards"])
def test_either_hook_suffices(silent: str):
    module = run_updates(CriticWarmup(2), 4, fires=lambda hook: hook != silent)
    assert moves(module, START) == [False, False, True, True]


def test_two_updates_of_one_rollout_count_as_two():
    class TwoUpdates(Toy):
        def learn(self, experience: Rows) -> None:
            super().learn(experience)
            super().learn(experience)

    module = run_updates(CriticWarmup(3), 2, module=TwoUpdates())
    assert moves(module, START) == [False, False, False, True]


def test_leaves_the_switch_alone_afterwards():
    """Another callback may freeze the actor later."""
    module = Toy()
    freeze = Spy("on_update_end", lambda module, experience: setattr(module, "actor_frozen", len(module.actors) == 2))
    run_updates([CriticWarmup(1), freeze], 5, module=module)
    assert moves(module, START) == [False, True, True, False, True]


@pytest.mark.parametrize("updates", [-1, 1.5, "2", None])
def test_only_whole_numbers_of_updates(updates):
    with pytest.raises(ValueError, match=rf"CriticWarmup\(updates={updates!r}\): must be a whole number"):
        CriticWarmup(updates)


def test_module_without_the_switch_is_refused_before_the_first_rollout():
    module = Toy()
    del module.actor_frozen
    with pytest.raises(TypeError, match="CriticWarmup needs actor_frozen on the module, which Toy lacks"):
        run_updates(CriticWarmup(1), module=module)
    assert module.experiences == []
