"""Draw unsolved prompts more often."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require_weighted_rows
from lit_ppo.callbacks.curriculum_sampling import CurriculumSampling
from lit_ppo.constructor import constructor
from lit_ppo.functional import sampling_priorities
from lit_ppo.validate import ascending, exactly_one, fraction, number


class PrioritizedSampling(PPOCallback):
    """Draws each prompt in proportion to one minus its success rate.

    Use it when some prompts are solved long before the rest and teach little more. The success rate is the mean over
    all training responses to the prompt so far, since a run visits a prompt too few times to forget old ones. An
    unseen prompt has a success rate of 0. Before ``RejectionSampling`` in the list it counts all responses, after it
    only the winners. If few prompts are unsolved, an update has each of them several times, as prompts of their own.
    Costs nothing. Needs a ``PromptDataModule``.

    Args:
        threshold: A response with at least this score is a success, any other is a failure. Give this or ``scale``.
        scale: The scores of a failure and of a success; a response between them is a partial success.
        floor: Weight of a prompt that is always solved, relative to one that is never solved: it is drawn now and
            then, so that the policy does not forget it.

    Reads ``experience.raw_scores``, ``prompt_index``; writes ``trainer.datamodule.set_weights``. Logs
    ``data/success_rate``, the mean over the responses of the update; it is below that of the full data set, since
    harder prompts are drawn.
    Source: Kimi Team 2025, arXiv:2501.12599, section 2.3 (prioritized sampling).
    """

    reads = ("raw_scores", "prompt_index")

    @constructor
    def __init__(
        self, threshold: float | None = None, scale: tuple[float, float] | None = None, floor: float = 0.05
    ) -> None:
        exactly_one(self, threshold=threshold, scale=scale)
        self.threshold = None if threshold is None else number(self, "threshold", threshold)
        self.scale = None if scale is None else ascending(self, "scale", scale)
        self.floor = fraction(self, "floor", floor)
        self._successes = self._responses = torch.zeros(0, dtype=torch.float64)  # per row of the data
        self._has_set_weights = False  # in this fit

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        why = "both would set the sampling weights"
        refuse_beside(self, trainer, PrioritizedSampling, CurriculumSampling, why=why)
        if stage == "fit":
            n_rows = _n_rows(require_weighted_rows(self, trainer, pl_module))
            if len(self._responses) != n_rows:  # the first fit
                self._successes = self._responses = torch.zeros(n_rows, dtype=torch.float64)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._set_weights(trainer)

    def restore(self, pl_module: Any) -> None:
        if self._has_set_weights:
            pl_module.trainer.datamodule.set_weights(None)
        self._has_set_weights = False

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        success = self._success(experience.raw_scores).cpu().double()
        rows = experience.prompt_index.cpu()
        self._successes = self._successes.index_add(0, rows, success)
        self._responses = self._responses.index_add(0, rows, torch.ones_like(success))

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
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
        self._has_set_weights = True

    def state_dict(self) -> dict[str, Any]:
        return {"successes": self._successes.tolist(), "responses": self._responses.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._successes = torch.tensor(state_dict["successes"], dtype=torch.float64)
        self._responses = torch.tensor(state_dict["responses"], dtype=torch.float64)


def _n_rows(data: Any) -> int:
    """Number of training rows of a data module: ``n_rows``, or the length of its columns."""
    n_rows: int = getattr(data, "n_rows", 0) or max(map(len, getattr(data, "columns", {}).values()), default=0)
    if not n_rows:
        raise TypeError(
            f"PrioritizedSampling needs the number of training rows, but {type(data).__name__} has neither columns nor "
            "n_rows; give it n_rows"
        )
    return n_rows
