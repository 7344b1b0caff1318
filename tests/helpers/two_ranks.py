"""Train a small job on two ranks, each of which checks that it is one of two and has its own share of the work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lit_ppo.advantages import GroupRelative
from lit_ppo.callbacks.base import PPOCallback
from tests.helpers.first_update import letters
from tests.helpers.ranks import on_ranks
from tests.helpers.toys import logged, make_data, make_module, make_trainer

JOBS: dict[str, dict[str, Any]] = {
    "critic": {},
    "group": {
        "advantages": GroupRelative(),
        "critic": None,
        "samples_per_prompt": 2,
        "kl_coef": 0.0,
        "eval_rewards": {"letters": letters},
    },
}


class TrainedRows(PPOCallback):
    """Keeps the prompts of the rows that this rank trains on, in order."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def on_actor_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
        self.prompts += minibatch.prompts

    def check_share(self) -> None:
        """Assert that no two ranks did the same work. Collective."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, tuple(self.prompts))
        assert len(set(everyone)) == len(everyone) > 1, "ranks did the same work"


def train_on_two(
    folder: Path, actor: Path, job: str = "critic", callbacks: Callable[[Path], list[Any]] | None = None
) -> dict[str, Any]:
    """Weights, logged metrics and validation metrics of a job on two ranks.

    Args:
        folder: Holds the data; if it holds ``held_out.jsonl``, the job validates on it.
        actor: The model's folder.
        job: A key of ``JOBS``.
        callbacks: Makes them from ``folder``; a function of some module.
    """
    on_ranks(2, _train, folder, actor, job, callbacks, folder=folder / "ranks")
    found: dict[str, Any] = torch.load(folder / "two.pt", weights_only=True)
    return found


def _train(folder: Path, actor: Path, job: str, callbacks: Callable[[Path], list[Any]] | None) -> None:
    module, rows = make_module(actor, **JOBS[job]), TrainedRows()
    trainer = make_trainer(folder / "two", devices=2, callbacks=[*(callbacks(folder) if callbacks else []), rows])
    held_out = folder / "held_out.jsonl"
    trainer.fit(module, make_data(folder, **({"val_path": str(held_out)} if held_out.exists() else {})))
    rows.check_share()
    if trainer.global_rank == 0:
        validated = [row for row in trainer.logger.rows if "val/score" in row]
        torch.save(
            {"weights": module.state_dict(), "logged": logged(trainer), "validated": validated}, folder / "two.pt"
        )
