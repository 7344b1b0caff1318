"""Train the critic on normalised returns."""

from typing import Any

import lightning as L
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require, require_model
from lit_ppo.callbacks.fields import present
from lit_ppo.constructor import constructor
from lit_ppo.functional import merge_moments, popart_rescaling
from lit_ppo.validate import fraction_or_none

# Lower bounds of the deviation for (almost) equal returns: that of the method's authors (Hessel et al. 2018,
# arXiv:1809.04474), and a hundredth of the mean, so that a critic that still predicts 0 is at most 100 deviations off.
LEAST_STD, LEAST_STD_OF_MEAN = 1e-4, 1e-2
SCORE_UNITS = 0.0, 1.0  # mean and standard deviation that change nothing


class ValueNormalization(PPOCallback):
    """Trains the critic on returns minus their mean, divided by their standard deviation (PopArt).

    Use it when the scale of the returns is unknown or drifts, so that one learning rate suits every critic, and scores
    and advantages must keep their units (``RewardNormalization`` would change them). When the statistics change, the
    critic's head is rescaled so that its predictions, in score units, do not change. Values and returns are in score
    units everywhere except in the critic (and in results of ``rollout``, which fires no hooks) and its loss:
    ``value/loss`` and ``ValueClipping(clip_range)`` are in standard deviations. After a fit the critic is in score
    units, too. Costs nothing. Needs a critic with ``rescale_head``.

    Args:
        decay: Weight of the earlier statistics at each update, for an exponential average such as 0.99; None weights
            all returns so far equally.

    Reads ``experience.returns``; writes ``experience.values`` (from the critic's units to score units), the critic's
    head (``critic.rescale_head``) and, for the critic's losses, ``minibatch.values`` and ``minibatch.returns``.
    Source: van Hasselt et al. 2016, arXiv:1602.07714, sections 2.1 and 2.2.
    """

    reads = ("values", "returns", "response_mask")

    @constructor
    def __init__(self, decay: float | None = None) -> None:
        self.decay = fraction_or_none(self, "decay", decay)
        self._moments = (0.0, 0.0, 0.0)  # of returns: weight, mean, sum of squared deviations
        self._is_restored = False  # the critic's head is in score units again, between two fits

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, ValueNormalization, why="both would rescale the critic's head")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        require_model(self, pl_module, "critic")
        require(self, pl_module.critic, "rescale_head")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._is_restored:
            pl_module.critic.rescale_head(*popart_rescaling(*SCORE_UNITS, *self._mean_and_std()))
        self._is_restored = False

    def restore(self, pl_module: Any) -> None:
        if self._moments[0] and not self._is_restored:
            pl_module.critic.rescale_head(*popart_rescaling(*self._mean_and_std(), *SCORE_UNITS))
            self._is_restored = True

    def on_rollout_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        experience.values = self._in_score_units(present(experience, "values"), experience.response_mask)
        extras = getattr(experience, "extras", {})
        if "action_values" in extras:  # behind other tokens, see CounterfactualActions
            extras["action_values"] = self._in_score_units(extras["action_values"], extras["action_mask"])

    def on_advantages(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        returns = present(experience, "returns")
        if not returns.isfinite().all():
            return  # the steps of this update will be skipped, and no later values would be finite
        before, kept = self._mean_and_std(), self.decay or 1.0
        weight, mean, m2 = self._moments
        self._moments = merge_moments(kept * weight, mean, kept * m2, returns[experience.response_mask])
        pl_module.critic.rescale_head(*popart_rescaling(*before, *self._mean_and_std()))

    def on_minibatch_start(self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike) -> None:
        minibatch.values = self._normalised(present(minibatch, "values"), minibatch.response_mask)
        minibatch.returns = self._normalised(present(minibatch, "returns"), minibatch.response_mask)

    def _mean_and_std(self) -> tuple[float, float]:
        weight, mean, m2 = self._moments
        if not weight:  # no returns yet
            return SCORE_UNITS
        return mean, max((m2 / weight) ** 0.5, LEAST_STD, LEAST_STD_OF_MEAN * abs(mean))

    def _in_score_units(self, x: Tensor, mask: Tensor) -> Tensor:
        mean, std = self._mean_and_std()
        return (x * std + mean).masked_fill(~mask, 0.0)

    def _normalised(self, x: Tensor, mask: Tensor) -> Tensor:
        mean, std = self._mean_and_std()
        return ((x - mean) / std).masked_fill(~mask, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self._moments, "is_restored": self._is_restored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._moments, self._is_restored = state_dict["moments"], state_dict["is_restored"]
