"""Prompts that are not solved yet come more often."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require_weighted_rows
from lit_ppo.callbacks.curriculum_sampling import CurriculumSampling
from lit_ppo.functional import sampling_priorities
from lit_ppo.validate import exactly_one, fraction


class PrioritizedSampling(PPOCallback):
    """Draws each prompt with a probability proportional to one minus its success rate.

    Use it when a part of the prompts is solved long before the rest: they teach little more. The success rate is the
    mean over all training responses to the prompt so far: a run visits a prompt too few times to forget some of them.
    A prompt not yet seen counts as never solved. Ahead of ``RejectionSampling`` in the list it counts all responses,
    behind it the winners. Costs nothing. Needs a ``PromptDataModule``.

    Args:
        threshold: A response with at least this score is a success, any other is none. Give this or ``scale``.
        scale: The scores of a failure and of a success; between them a response is a part of a success.
        floor: The weight of a prompt that is always solved, where one never solved has 1: it comes back now and then,
            lest it is forgotten.

    Reads ``experience.raw_scores``, ``prompt_index``; writes ``trainer.datamodule.set_weights``. Logs
    ``data/success_rate``, the mean over the update's responses: below that of the whole data set, as the harder
    prompts are drawn.
    Source: Kimi Team 2025, arXiv:2501.12599, section 2.3 (prioritized sampling).
    """

    def __init__(
        self, threshold: float | None = None, scale: tuple[float, float] | None = None, floor: float = 0.05
    ) -> None:
        exactly_one(self, threshold=threshold, scale=scale)
        if threshold is not None and not abs(threshold) < float("inf"):
            raise ValueError(f"PrioritizedSampling(threshold={threshold!r}): must be a finite number")
        if scale is not None and not (len(scale) == 2 and float("-inf") < scale[0] < scale[1] < float("inf")):
            raise ValueError(
                f"PrioritizedSampling(scale={scale!r}): must be two finite numbers, a failure's score and a success's, "
                "the lower one first"
            )
        self.threshold, self.scale = threshold, scale
        self.floor = fraction(self, "floor", floor)
        self._successes = self._responses = torch.zeros(0, dtype=torch.float64)  # of each row of the data

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse data that cannot be drawn by weight, and another who sets the weights."""
        why = "both would set the sampling weights"
        refuse_beside(self, trainer, PrioritizedSampling, CurriculumSampling, why=why)
        if stage == "fit":
            n_rows = _n_rows(require_weighted_rows(self, trainer, pl_module))
            if len(self._responses) != n_rows:  # the first fit
                self._successes = self._responses = torch.zeros(n_rows, dtype=torch.float64)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Before the first batch is drawn."""
        self._set_weights(trainer)

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Count successes."""
        success = self._success(experience.raw_scores).cpu().double()
        rows = experience.prompt_index.cpu()
        self._successes = self._successes.index_add(0, rows, success)
        self._responses = self._responses.index_add(0, rows, torch.ones_like(success))

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Set the weights that the next update's prompts are drawn by."""
        pl_module.log("data/success_rate", float(self._success(experience.raw_scores).mean()))
        self._set_weights(trainer)

    def _success(self, scores: Tensor) -> Tensor:
        if self.threshold is not None:
            return (scores >= self.threshold).float()
        assert self.scale is not None
        failure, success = self.scale
        return ((scores - failure) / (success - failure)).clamp(0.0, 1.0)

    def _set_weights(self, trainer: Any) -> None:
        trainer.datamodule.set_weights(sampling_priorities(self._successes, self._responses, self.floor))

    def state_dict(self) -> dict[str, Any]:
        """Successes and responses of each row."""
        return {"successes": self._successes.tolist(), "responses": self._responses.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up again."""
        self._successes = torch.tensor(state_dict["successes"], dtype=torch.float64)
        self._responses = torch.tensor(state_dict["responses"], dtype=torch.float64)


def _n_rows(data: Any) -> int:
    """The training rows of a data module; those of its columns where it does not say how many it has."""
    n_rows: int = getattr(data, "n_rows", 0) or max(map(len, data.columns.values()), default=0)
    if not n_rows:
        raise TypeError(
            f"PrioritizedSampling weighs every row, and {type(data).__name__} has neither columns nor n_rows to tell "
            "how many there are; give it n_rows"
        )
    return n_rows
