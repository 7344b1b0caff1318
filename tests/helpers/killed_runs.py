"""Runs of the command in forked children that are killed at a chosen moment, and what they leave behind."""

import io
import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lit_ppo import TextDataModule, callbacks
from lit_ppo.console.report import RunReport
from lit_ppo.parallel.checkpoint_io import read_summary
from lit_ppo.run.checkpoint import StepCheckpoint, find_last, steps_logged
from lit_ppo.run.errors import CommandError
from tests.helpers.tiny import WORDS
from tests.helpers.toys import make_data, make_module, make_trainer

EVENTS = "LIT_PPO_TEST_EVENTS"  # file that every event is appended to
KILL_AT = "LIT_PPO_TEST_KILL_AT"  # event at which the process kills itself, and which one of that name

_seen: Counter[str] = Counter()


def event(name: str) -> None:
    """Record a moment of the run, and kill the process if it is the chosen one."""
    _seen[name] += 1
    with open(os.environ[EVENTS], "a") as file:
        file.write(name + "\n")
    if f"{name} x {_seen[name]}" == os.environ.get(KILL_AT):
        os.kill(os.getpid(), signal.SIGKILL)


def reward(prompts: list[str], responses: list[str]) -> list[float]:
    """Longer is better; an event in the middle of scoring."""
    event("scoring")
    return [float(len(response.split())) for response in responses]


HOOKS = {
    "on_before_optimizer_step": "optimizer step",
    "on_train_batch_end": "batch end",
    "on_save_checkpoint": "gathering the checkpoint",
    "on_validation_batch_end": "validating",
    "on_train_end": "train end",
}


class Moments(callbacks.PPOCallback):
    """Records moments between hooks, and every step of writing a checkpoint."""

    def __init__(self) -> None:
        for hook, name in HOOKS.items():
            setattr(self, hook, lambda *_, name=name: event(name))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for name in ("replace", "remove"):
            setattr(os, name, _with_events(f"os.{name}", getattr(os, name)))
        torch.save = _in_two_halves

    def on_rollout_start(self, trainer: Any, pl_module: Any, prompts: Any) -> None:
        event(f"update {pl_module.rollouts}")
        event(f"rows {prompts.prompt_index.tolist()}")


def _with_events(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        event(f"before {name}")
        result = function(*args, **kwargs)
        event(f"after {name}")
        return result

    return wrapped


_save = torch.save


def _in_two_halves(checkpoint: Any, file: Any) -> None:
    complete = io.BytesIO()
    _save(checkpoint, complete)
    data = complete.getvalue()
    file.write(data[: len(data) // 2])
    file.flush()
    event("half written")
    file.write(data[len(data) // 2 :])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete one of the run, if there is one."""
    try:
        return find_last(folder)
    except CommandError:
        return None


def brevity(prompts: list[str], responses: list[str]) -> list[float]:
    """The opposite of the reward."""
    return [-float(len(response.split())) for response in responses]


def tricks_of(run: str, folder: Path) -> list[Any]:
    """All that keep a state and can stand together; of those that exclude each other, ``"others"`` has the rest."""
    if run == "others":
        return [callbacks.RewardScaling(decay=0.9), callbacks.ReferenceUpdate(decay=0.7)]
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": " ".join(WORDS[i : i + 3 + i % 3])}) + "\n" for i in range(5)))
    if run == "monitors":
        return [
            callbacks.AlignmentTax(TextDataModule(str(texts), batch_size=2), every=2),
            callbacks.Cockpit(every=2, figures_every=3, best_of_prompts=2, best_of=2),
            callbacks.CollapseMonitor(),
            callbacks.RewardHackingMonitor(brevity, prompts=4, every=2),
            callbacks.SampleLogger(every=3, prompts=2),
        ]
    return [
        callbacks.CriticWarmup(updates=2),
        callbacks.PrioritizedSampling(scale=(0.0, 10.0)),
        callbacks.RewardNormalization(),
        callbacks.RejectionSampling(k=2, every=4),
        callbacks.ValueNormalization(),
        callbacks.AdaptiveKL(target=0.01, horizon=50),
        callbacks.PTXLoss(TextDataModule(str(texts), batch_size=2, seed=1), coef=0.5),
        callbacks.EntropyBonus(coef=0.5, target=3.67),
        callbacks.KLEarlyStop(target=0.05),
        callbacks.LearningRateAdaptation(target=0.01, maximum=0.1),
        callbacks.ReferenceUpdate(every=3),
    ]


def train(folder: Path, actor: Path, updates: int, run: str) -> None:
    """The run, from wherever it stands, as the command makes it: two batches an epoch, validation every third.

    ``"others"`` counts epochs, and saves only at their ends.
    """
    in_epochs = run == "others"
    newest = last_checkpoint(folder)
    purge = 0 if newest is None else steps_logged(read_summary(newest))
    logger = TensorBoardLogger(folder, name="", version=0, purge_step=purge, default_hp_metric=False)
    checkpoint = StepCheckpoint(every_n_train_steps=2 if in_epochs else 1)
    checkpoint.log_again = newest is not None
    trainer = make_trainer(
        folder,
        callbacks=[Moments(), *tricks_of(run, folder.parent), RunReport(prompts=2, samples=0), checkpoint],
        logger=logger,
        max_steps=-1 if in_epochs else updates,
        max_epochs=updates // 2 if in_epochs else -1,
        enable_checkpointing=True,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )

    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-2)

    def decay(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)

    module = make_module(
        actor, rewards=reward, actor_optimizer=adam, critic_optimizer=adam, critic_scheduler=decay, max_grad_norm=1.0
    )
    data = make_data(folder.parent, val_path=str(folder.parent / "prompts.jsonl"))
    trainer.fit(module, data, ckpt_path=None if newest is None else str(newest))


def child(folder: Path, actor: Path, updates: int, run: str, kill_at: str | None) -> None:
    """The body of a forked process."""
    os.environ[EVENTS] = str(folder / "events.txt")
    os.environ[KILL_AT] = kill_at or ""
    torch.set_num_threads(1)
    sink = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    train(folder, actor, updates, run)
