"""Bring scores to unit variance and leave their zero where it is."""

from typing import Any, Literal

import lightning as L
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside
from lit_ppo.callbacks.reward_normalization import RewardNormalization
from lit_ppo.functional import merge_moments
from lit_ppo.validate import one_of


class RewardScaling(PPOCallback):
    """Divides ``scores`` by their standard deviation and subtracts nothing; ``raw_scores`` stay.

    Use it when the scale of the reward is unknown but its sign and zero mean something: a score over 0 stays over 0.
    Scores far from 0 beside their deviation become large; there ``RewardNormalization`` serves better. Scores without
    a deviation (a single one, or all alike to within 1e-4) are left as they are. Costs nothing.

    Args:
        statistics: What the deviation is of: all training scores seen, this update's included (``"running"``; saved
            and restored), or this update's scores (``"batch"``).
        decay: With ``"running"``: how much less a score counts after each update. Mean and variance are then
            exponential moving averages, with weights ``decay ** age`` over their sum (for the variance less one, as
            for plain counts), so that the first update's do not linger; None counts all scores alike.

    Reads and writes ``experience.scores``.
    Source: Zheng et al. 2023, arXiv:2307.04964, section 5.3 (reward scaling); Engstrom et al. 2020,
    arXiv:2005.12729, section 3 (for control tasks, by the deviation of discounted sums).
    """

    def __init__(self, statistics: Literal["running", "batch"] = "running", decay: float | None = None) -> None:
        self.statistics = one_of(self, "statistics", statistics, ("running", "batch"))
        if decay is not None and not 0 < decay < 1:
            raise ValueError(f"RewardScaling(decay={decay!r}): must be between 0 and 1; None counts all scores alike")
        if decay is not None and statistics != "running":
            raise ValueError(
                f"RewardScaling(statistics={statistics!r}, decay={decay!r}): decay goes with statistics='running' alone"
            )
        self.decay = decay
        self._moments: tuple[float, float, float] = (0, 0.0, 0.0)  # count (or weight), mean, sum of squared deviations

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a second callback that sets the scale of the scores."""
        refuse_beside(self, trainer, RewardScaling, RewardNormalization, why="both would rescale the scores")

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Scale the scores."""
        variance = self._variance(experience.scores)
        if variance > 1e-8:
            experience.scores = experience.scores / variance**0.5

    def _variance(self, scores: Tensor) -> float:
        count, mean, m2 = self._moments
        if self.decay is not None:
            count, m2 = self.decay * count, self.decay * m2
        count, mean, m2 = merge_moments(count, mean, m2, scores)
        if self.statistics == "running":
            self._moments = count, mean, m2
        return m2 / (count - 1) if count > 1 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Moments of everything seen."""
        return {"moments": self._moments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up again."""
        self._moments = state_dict["moments"]
