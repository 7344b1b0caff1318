"""Measure what PPO costs in general ability: the loss on unrelated text."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lit_ppo.callbacks.base import PPOCallback, PPOModule
from lit_ppo.callbacks.checks import loader_over_rows, refuse_beside, require, require_data_module, warn_of_gaps
from lit_ppo.callbacks.trainer import as_in_a_step, batch_of, make_ready
from lit_ppo.constructor import constructor
from lit_ppo.validate import integer


class AlignmentTax(PPOCallback):
    """Measures the actor's next-token loss on held-out general text at the start and every few updates.

    Use it when the model must keep abilities that the reward does not measure: a rising loss shows that PPO unlearns
    them; ``PTXLoss``, a larger ``kl_coef`` or fewer updates help. It uses the same texts every time, at temperature 1.
    Costs one forward of the actor on ``batches`` batches each time, without gradients.

    Args:
        data: The text, a ``TextDataModule`` or another LightningDataModule whose batches the module's
            ``loss_on_text`` accepts. Its validation rows are used if it has some, else its training rows, in order.
            Do not use text that ``PTXLoss`` trains on.
        every: Updates between measurements; the last one is at the end of the run.
        batches: Number of batches to read, or all if there are fewer.

    Calls ``pl_module.loss_on_text``; writes nothing. Logs ``tax/loss``, nats per token, and ``tax/loss_increase``, its
    increase since the start of the run, with the numbers of the rollout by the same policy.
    Source: Ouyang et al. 2022, arXiv:2203.02155, sections 1 and 3.5 (the alignment tax).
    """

    @constructor
    def __init__(self, data: L.LightningDataModule, every: int = 50, batches: int = 8) -> None:
        self.data = require_data_module(self, data)
        self.every = integer(self, "every", every)
        self.batches = integer(self, "batches", batches)
        self._updates = 0
        self._start: float | None = None  # loss at the start of the run; None until measured or restored
        self._measured: dict[str, float] = {}  # in this update
        self._loader: DataLoader[Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require(self, pl_module, "loss_on_text")
        refuse_beside(self, trainer, AlignmentTax, why="both would log tax/loss")
        if stage != "fit":
            return
        warn_of_gaps(self, trainer)
        make_ready(self.data, trainer)
        held_out = is_overridden("val_dataloader", self.data) and self.data.val_dataloader()
        self._loader = loader_over_rows(self, self.data, "val_dataloader" if held_out else "train_dataloader")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure the policy that is about to sample, before the timing of the update starts."""
        self._measured = self._measure(trainer, pl_module) if self._updates % self.every == 0 else {}

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: Any) -> None:
        self._updates += 1
        for name, value in self._measured.items():
            pl_module.log(name, value)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        measured = self._measure(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(measured, step=self._updates)

    def _measure(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        loader = self._loader
        assert loader is not None
        dataset: Any = loader.dataset
        size, n_rows = loader.batch_size or 1, len(dataset)
        total = n_tokens = 0.0
        with as_in_a_step(trainer):
            for start in range(0, min(n_rows, self.batches * size), size):
                loss, n = pl_module.loss_on_text(batch_of(loader, list(range(start, min(start + size, n_rows)))))
                total, n_tokens = total + loss * n, n_tokens + n
        loss = total / n_tokens
        if self._start is None:
            self._start = loss
        return {"tax/loss": loss, "tax/loss_increase": loss - self._start}

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.data.teardown(stage)
            self.data.trainer = self._loader = None

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates, self._start = state_dict["updates"], state_dict["start"]
