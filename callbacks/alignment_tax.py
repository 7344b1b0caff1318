"""What learning from scores costs elsewhere: the loss on text that has nothing to do with it."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lit_ppo.callbacks.base import PPOCallback, PPOModule, as_in_a_step, batch_of, make_ready
from lit_ppo.callbacks.checks import loader_over_rows, refuse_beside, require, warn_of_gaps
from lit_ppo.validate import integer


class AlignmentTax(PPOCallback):
    """Measures the actor's next-token loss on held-out general text at the start and every so many updates.

    Use it when the model is to be good at more than the reward asks for: a loss that rises says that PPO unlearns what
    the model could do before; ``PTXLoss``, a larger ``kl_coef`` or fewer updates answer it. The same texts every time,
    at temperature 1. Costs a forward of the actor on ``batches`` batches each time, and no memory: no gradients.

    Args:
        data: The text, a ``TextDataModule`` or another LightningDataModule with batches that the module's
            ``loss_on_text`` takes: its validation rows where it has some, else its training rows, in their order.
            Text that is trained on, by ``PTXLoss``, is the wrong one.
        every: Updates from one time to the next; once more at the end of the run.
        batches: The first so many batches of the data are read, or all if there are fewer.

    Calls ``pl_module.loss_on_text``; writes nothing. Logs ``tax/loss``, nats a token, and ``tax/loss_increase``, what
    it has gone up by since the start of the run, both beside the numbers of the rollout by the same policy.
    Source: Ouyang et al. 2022, arXiv:2203.02155, sections 1 and 3.5 (the alignment tax).
    """

    def __init__(self, data: L.LightningDataModule, every: int = 50, batches: int = 8) -> None:
        if not isinstance(data, L.LightningDataModule):
            raise ValueError(f"AlignmentTax(data={data!r}): must be a LightningDataModule, such as a TextDataModule")
        self.data = data
        self.every = integer(self, "every", every)
        self.batches = integer(self, "batches", batches)
        self._updates = 0
        self._start: float | None = None  # the loss, None until it is measured or a checkpoint tells it
        self._measured: dict[str, float] = {}  # in this update
        self._loader: DataLoader[Any] | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module that cannot read text and a second one of these, and read the text."""
        require(self, pl_module, "loss_on_text")
        refuse_beside(self, trainer, AlignmentTax, why="both would log tax/loss")
        if stage != "fit":
            return
        warn_of_gaps(self, trainer)
        make_ready(self.data, trainer)
        held_out = is_overridden("val_dataloader", self.data) and self.data.val_dataloader()
        self._loader = loader_over_rows(self, self.data, "val_dataloader" if held_out else "train_dataloader")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Measure, if it is time: of the policy that is about to sample, outside of the time that it takes."""
        self._measured = self._measure(trainer, pl_module) if self._updates % self.every == 0 else {}

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: Any) -> None:
        """Log with the rest of the update's numbers."""
        self._updates += 1
        for name, value in self._measured.items():
            pl_module.log(name, value)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure the policy that the run leaves behind."""
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
        """Let go of the trainer."""
        if stage == "fit":
            self.data.teardown(stage)
            self.data.trainer = self._loader = None

    def state_dict(self) -> dict[str, Any]:
        """What the run started from, and how far it is."""
        return {"updates": self._updates, "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with the whole run's start."""
        self._updates, self._start = state_dict["updates"], state_dict["start"]
