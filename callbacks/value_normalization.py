"""Let the critic learn returns of any scale."""

from typing import Any

import lightning as L
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require, require_model
from lit_ppo.functional import merge_moments, popart_rescaling

# Returns that are (almost) all alike have no deviation to divide by: the least one is what the method's authors use
# (Hessel et al. 2018, arXiv:1809.04474), and a hundredth of the mean, so that a critic which still predicts 0 is at
# most 100 deviations off.
LEAST_STD, LEAST_STD_OF_MEAN = 1e-4, 1e-2


class ValueNormalization(PPOCallback):
    """Has the critic learn returns less their mean, over their standard deviation (PopArt).

    Use it when the scale of the returns is unknown or drifts, so that one critic rate suits all, and scores and
    advantages are to keep their units (``RewardNormalization`` would change them). When the statistics move, the
    critic's head is rescaled so that what it predicts, in score units, stays put. Values and returns are in score
    units everywhere except in the critic (and what the silent ``rollout`` has of it) and its loss: ``value/loss`` and
    ``ValueClipping(clip_range)`` are in standard deviations. Costs nothing. Needs a critic whose head can be rescaled.

    Args:
        decay: Weight that the statistics so far keep at each update, an exponential average such as 0.99; None keeps
            all of it: the moments are those of all returns seen.

    Reads ``experience.returns``; writes ``experience.values`` (from the critic's units to score units), the critic's
    head (``critic.rescale_head``) and, for the critic's losses, ``minibatch.values`` and ``minibatch.returns``.
    Source: van Hasselt et al. 2016, arXiv:1602.07714, sections 2.1 and 2.2.
    """

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not (isinstance(decay, float) and 0 < decay < 1):
            raise ValueError(f"ValueNormalization(decay={decay!r}): must be over 0 and under 1; None forgets nothing")
        self.decay = decay
        self._moments = (0.0, 0.0, 0.0)  # of returns: their weight, mean, sum of squared deviations

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a second normalisation."""
        refuse_beside(self, trainer, ValueNormalization, why="both would rescale the critic's head")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse a module without a critic, or with one whose head is out of reach."""
        require_model(self, pl_module, "critic")
        require(self, pl_module.critic, "rescale_head")

    def on_rollout_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Bring the critic's predictions to score units."""
        assert experience.values is not None  # there is a critic
        mean, std = self._mean_and_std()
        experience.values = (experience.values * std + mean).masked_fill(~experience.response_mask, 0.0)

    def on_advantages(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Move the statistics, and the critic's head with them."""
        assert experience.returns is not None  # there is a critic
        before, kept = self._mean_and_std(), self.decay or 1.0
        weight, mean, m2 = self._moments
        self._moments = merge_moments(kept * weight, mean, kept * m2, experience.returns[experience.response_mask])
        pl_module.critic.rescale_head(*popart_rescaling(*before, *self._mean_and_std()))

    def on_minibatch_start(self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike) -> None:
        """Bring what the critic's losses compare to its units."""
        assert minibatch.values is not None
        assert minibatch.returns is not None
        minibatch.values = self._normalised(minibatch.values, minibatch.response_mask)
        minibatch.returns = self._normalised(minibatch.returns, minibatch.response_mask)

    def _mean_and_std(self) -> tuple[float, float]:
        weight, mean, m2 = self._moments
        if not weight:  # nothing seen
            return 0.0, 1.0
        return mean, max((m2 / weight) ** 0.5, LEAST_STD, LEAST_STD_OF_MEAN * abs(mean))

    def _normalised(self, x: Tensor, mask: Tensor) -> Tensor:
        mean, std = self._mean_and_std()
        return ((x - mean) / std).masked_fill(~mask, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Moments of the returns seen."""
        return {"moments": self._moments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up again."""
        self._moments = state_dict["moments"]
