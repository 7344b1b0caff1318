"""Normalise advantages to zero mean and unit variance."""

from typing import Any, Literal

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_behind
from lit_ppo.callbacks.importance_correction import ImportanceCorrection
from lit_ppo.constructor import constructor
from lit_ppo.functional import whiten
from lit_ppo.validate import boolean, one_of, positive_or_none


class AdvantageNormalization(PPOCallback):
    """Shifts and scales ``advantages`` to zero mean and unit variance over response tokens, then clips them.

    Use it nearly always: the step size of the policy then does not depend on the scale of the scores. With few
    responses per batch, prefer ``scope="batch"``, since the moments of a small minibatch are noisy. Costs nothing.

    Args:
        scope: Compute the moments over the full ``"batch"``, once per update, or over each ``"minibatch"``.
        clip: Maximum absolute value of a normalised advantage; None for no bound.
        unbiased: Divide the sum of squares by the number of tokens minus one. Both sources divide by the number.

    Reads and writes ``experience.advantages`` (``"batch"``) or ``minibatch.advantages`` (``"minibatch"``).
    Source: Ziegler et al. 2019, arXiv:1909.08593, its code (per batch); Schulman et al. 2017's code (baselines
    ``ppo2``, per minibatch); compared by Andrychowicz et al. 2020, arXiv:2006.05990.
    """

    reads = ("advantages", "response_mask")

    @constructor
    def __init__(
        self, scope: Literal["batch", "minibatch"] = "batch", clip: float | None = None, unbiased: bool = True
    ) -> None:
        self.scope = one_of(self, "scope", scope, ("batch", "minibatch"))
        self.clip = positive_or_none(self, "clip", clip)
        self.unbiased = boolean(self, "unbiased", unbiased)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self.scope == "minibatch":
            refuse_behind(self, trainer, ImportanceCorrection, why="its weights would be normalised away")

    def waits_for(self, pl_module: Any) -> set[str]:
        return {"on_advantages"} if self.scope == "batch" else {"on_minibatch_start"}

    def on_advantages(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        if self.scope == "batch":
            self._normalize(experience)

    def on_minibatch_start(self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike) -> None:
        if self.scope == "minibatch":
            self._normalize(minibatch)

    def _normalize(self, rows: ExperienceLike) -> None:
        advantages = whiten(rows.advantages, rows.response_mask, self.unbiased)
        rows.advantages = advantages if self.clip is None else advantages.clamp(-self.clip, self.clip)
