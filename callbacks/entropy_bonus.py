"""Reward the policy for high entropy."""

from math import isfinite
from typing import Any

import lightning as L
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import metric, refuse_beside
from lit_ppo.constructor import constructor
from lit_ppo.validate import positive, positive_or_none


class EntropyBonus(PPOCallback):
    """Adds ``-coef`` times the mean entropy of the sampling distribution to the actor's loss.

    Use it when responses become similar early and the score stops rising. A KL penalty to the reference already keeps
    entropy up, so start small. Costs nothing: the entropy is computed anyway.

    Args:
        coef: Weight of the entropy, in units of loss per nat.
        target: Entropy in nats per token, as of the previous optimizer step, above which the bonus is off; None keeps
            it on.

    Reads ``minibatch.new_entropy``, ``metrics["entropy"]``; adds ``losses["entropy"]``.
    Source: Mnih et al. 2016, arXiv:1602.01783, section 4; Schulman et al. 2017, arXiv:1707.06347, equation 9.
    """

    reads = ("new_entropy",)

    @constructor
    def __init__(self, coef: float = 0.01, target: float | None = None) -> None:
        self.coef = positive(self, "coef", coef)
        self.target = positive_or_none(self, "target", target)
        self._entropy: float | None = None  # of the previous step of the actor; None before the first

    def waits_for(self, pl_module: Any) -> set[str]:
        return {"on_actor_loss"} if self.target is None else {"on_actor_loss", "on_minibatch_end"}

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, EntropyBonus, why="both would set losses['entropy']")

    def on_actor_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        if self.target is None or self._entropy is None or self._entropy <= self.target:
            losses["entropy"] = -self.coef * minibatch.mean(minibatch.new_entropy)

    def on_minibatch_end(
        self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike, metrics: dict[str, float]
    ) -> None:
        if self.target is not None:
            entropy = metric(self, pl_module, metrics, "entropy")
            self._entropy = self._entropy if entropy is None or not isfinite(entropy) else entropy

    def state_dict(self) -> dict[str, Any]:
        return {"entropy": self._entropy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._entropy = state_dict["entropy"]
