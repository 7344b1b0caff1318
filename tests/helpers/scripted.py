"""A module whose updates take as long as the test says, by a clock of the test's own."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_ppo.callbacks import fire
from tests.helpers.toys import make_trainer


class Clock:
    """Seconds, which pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Scripted(L.LightningModule):
    """Takes two optimizer steps an update.

    Args:
        clock: Passes by ``seconds`` of the update at work, and by 100 in every validation batch.
        seconds: Of each update.
        scores: The mean score of each update's four responses, of 2, 2, 4 and 4 tokens; None fires no hooks.
        kl: Of each update, nats a response; None: there is no reference.
    """

    def __init__(
        self,
        clock: Clock,
        seconds: Sequence[float],
        scores: Sequence[float] | None = None,
        kl: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.clock, self.seconds, self.scores, self.kl = clock, seconds, scores, kl
        self.net = torch.nn.Linear(1, 1)
        self.done = 0
        self.progress = SimpleNamespace(phase="", detail="", since=None)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        update = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        self.progress = SimpleNamespace(phase="rollout", detail="", since=self.clock.now)
        self.clock.now += self.seconds[update]
        self.during(update)
        if self.scores is not None:
            fire(self, "on_update_end", self.experience(update))
        for optimizer in self.optimizers():
            optimizer.step()
        self.progress = SimpleNamespace(phase="", detail="", since=None)
        self.log("objective/score", float(update), prog_bar=True)
        self.log("throughput/tokens_per_second", 1234.4, prog_bar=True)

    def during(self, update: int) -> None:
        """For tests that look in the middle of an update."""

    def experience(self, update: int) -> Any:
        mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
        scores = torch.tensor([-1.0, 1.0, -1.0, 1.0]) + self.scores[update]
        kl = torch.zeros(4, 4)
        kl[:, 0] = 0.0 if self.kl is None else self.kl[update]
        reference = None if self.kl is None else torch.zeros(4, 4)
        return SimpleNamespace(response_mask=mask, raw_scores=scores, kl=kl, ref_logprobs=reference)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.clock.now += 100.0
        self.log("val/score", float(self.trainer.global_step))

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.0) for _ in range(2)]


class Automatic(L.LightningModule):
    """Leaves the steps to Lightning; its metric is the batch's number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("train/loss", float(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1), prog_bar=True)
        loss: Tensor = self.net(batch).sum()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", float(self.trainer.global_step), prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(folder: Path, module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Train on three batches an epoch; validation has two."""
    arguments: dict[str, Any] = {
        "max_steps": -1, "max_epochs": 2, "limit_val_batches": 0, "num_sanity_val_steps": 0, "logger": False,
        "enable_progress_bar": True,
    }  # fmt: skip
    resume = options.pop("resume", None)
    trainer = make_trainer(folder, **{**arguments, **options}, callbacks=list(callbacks))
    rows = torch.zeros(3, 1)
    trainer.fit(module, Loader(rows), Loader(rows[:2]), ckpt_path=resume)
    return trainer


class Loader(DataLoader[Any]):
    """Goes on where it was; Lightning has advice about workers for others."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows, batch_size=1)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return None
