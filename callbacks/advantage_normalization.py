"""Bring advantages to zero mean and unit variance."""

from typing import Literal

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule
from lit_ppo.functional import whiten
from lit_ppo.validate import one_of, positive_or_none


class AdvantageNormalization(PPOCallback):
    """Shifts and scales ``advantages`` to zero mean and unit variance over response tokens, then clips them.

    Use it nearly always: the size of the policy's step then no longer hangs on the scale of the scores. With few
    responses a batch, prefer ``scope="batch"``; a small minibatch's moments are noisy. Costs nothing.

    Args:
        scope: What the moments are taken over: the whole ``"batch"``, once an update, or each ``"minibatch"``.
        clip: Bound on the size of a normalised advantage; None for no bound.

    Reads and writes ``experience.advantages`` (``"batch"``) or ``minibatch.advantages`` (``"minibatch"``).
    Source: Ziegler et al. 2019, arXiv:1909.08593, its code (per batch); Schulman et al. 2017's code (baselines
    ``ppo2``, per minibatch); Andrychowicz et al. 2020, arXiv:2006.05990, compare.
    """

    def __init__(self, scope: Literal["batch", "minibatch"] = "batch", clip: float | None = None) -> None:
        self.scope = one_of(self, "scope", scope, ("batch", "minibatch"))
        self.clip = positive_or_none(self, "clip", clip)

    def on_advantages(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Normalise over the update."""
        if self.scope == "batch":
            self._normalize(experience)

    def on_minibatch_start(self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike) -> None:
        """Normalise over one optimizer step."""
        if self.scope == "minibatch":
            self._normalize(minibatch)

    def _normalize(self, rows: ExperienceLike) -> None:
        advantages = whiten(rows.advantages, rows.response_mask)
        rows.advantages = advantages if self.clip is None else advantages.clamp(-self.clip, self.clip)
