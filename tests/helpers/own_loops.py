"""Jobs run by ``Trainer.fit``, and by a loop of the user's own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ppo import callbacks
from tests.helpers.toys import count_good, logged, make_data, make_module, make_trainer

VARY = ("time/", "throughput/", "memory/", "epoch")  # metrics that no two runs share


class Hooks(callbacks.PPOCallback):
    """Keeps the names of all hooks of an update, in order; logs in an early one."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name in callbacks.base.HOOKS or name in ("on_train_batch_end", "on_validation_end", "on_train_end"):
            self.names.append(name)
        return super().__getattribute__(name)

    def on_rollout_end(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        pl_module.log("rows", float(len(experience)))


def tricks() -> list[Any]:
    """Tricks with states, and those that act before scores are there."""
    return [
        callbacks.PrioritizedSampling(scale=(-1.0, 1.0)),
        callbacks.RewardNormalization(),
        callbacks.AdaptiveKL(target=0.01, horizon=50),
        callbacks.ValueNormalization(),
        callbacks.CriticWarmup(updates=1),
        callbacks.RejectionSampling(k=2, every=3),
        Hooks(),
    ]


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that two equal runs share."""
    return {name: value for name, value in metrics.items() if not name.startswith(VARY)}


def result(module: Any, trainer: Any) -> dict[str, Any]:
    """What a run has come to; collective."""
    states = {type(callback).__name__: callback.state_dict() for callback in trainer.callbacks}
    weights = {name: value.clone() for name, value in trainer.strategy.lightning_module_state_dict().items()}
    hooks = next((callback.names for callback in trainer.callbacks if isinstance(callback, Hooks)), [])
    return {"weights": weights, "logged": [numbers(row) for row in logged(trainer)], "states": states, "hooks": hooks}


def by_fit(folder: Path, actor: Path, ckpt_path: Any = None, data: dict[str, Any] | None = None, **trainer: Any) -> Any:
    """Four updates by ``Trainer.fit``."""
    module, runs = make_module(actor, rewards=count_good), make_trainer(folder / "fit", **{"max_steps": 4, **trainer})
    runs.fit(module, make_data(folder, **(data or {})), ckpt_path=ckpt_path)
    return result(module, runs)


def by_hand(
    folder: Path,
    actor: Path,
    ckpt_path: Any = None,
    data: dict[str, Any] | None = None,
    updates: int = 4,
    **trainer: Any,
) -> Any:
    """The same by hand, where scores come from outside; also what each step returns."""
    module, runs = make_module(actor, rewards=None), make_trainer(folder / "own", **{"max_steps": 4, **trainer})
    steps = []
    with module.attach(runs, make_data(folder, **(data or {})), ckpt_path=ckpt_path) as batches:
        for prompts in batches:
            experience = module.rollout(prompts)
            experience.scores = count_good(experience.prompts, experience.responses)
            steps.append(numbers(module.step(experience)))
            if len(steps) == updates:
                break
    return {**result(module, runs), "steps": steps}


def on_each_rank(folder: Path, actor: Path) -> None:
    """Both, under DDP and FSDP2; what they come to must be the same, and other scores on one rank are refused."""
    for strategy in ("ddp", "fsdp2"):
        runs = {"strategy": strategy, "devices": 2, "max_steps": 2}
        fit, own = (run(folder, actor, callbacks=tricks(), **runs) for run in (by_fit, by_hand))
        assert own["steps"] == own["logged"]
        check_same(own, fit)
    rank = torch.distributed.get_rank()
    module = make_module(actor, rewards=None)
    with module.attach(make_trainer(folder, devices=2)):
        experience = module.rollout(["the film", "a story was"])
        for scores, problem in (([0.0, float(rank)], "different"), ([0.0] * (2 - rank), "1 value")):
            experience.scores = scores
            with pytest.raises((ValueError, RuntimeError), match=problem):
                module.step(experience)
        experience.scores = [0.0, 1.0]
        assert module.step(experience)["objective/score"] == 0.5


def check_same(own: dict[str, Any], fit: dict[str, Any]) -> None:
    """Assert that two runs have come to the same, to the bit."""
    assert own["logged"] == fit["logged"]
    assert own["states"] == fit["states"]
    assert own["hooks"] == fit["hooks"]
    assert own["weights"].keys() == fit["weights"].keys()
    assert all(torch.equal(value, fit["weights"][name]) for name, value in own["weights"].items())
