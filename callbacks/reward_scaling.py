"""Scale scores to unit variance without a shift."""

from typing import Any, Literal

import lightning as L
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside
from lit_ppo.callbacks.reward_normalization import RewardNormalization
from lit_ppo.constructor import constructor
from lit_ppo.functional import merge_moments
from lit_ppo.validate import fraction_or_none, one_of, refuse


class RewardScaling(PPOCallback):
    """Divides ``scores`` by their standard deviation and does not shift them; ``raw_scores`` do not change.

    Use it when the scale of the reward is unknown but its sign and zero have a meaning: a score above 0 stays above 0.
    Scores with a mean far from 0 relative to their deviation become large; prefer ``RewardNormalization`` for those.
    Scores without a deviation (a single one, or all equal to within 1e-4) do not change. Costs nothing.

    Args:
        statistics: Source of the deviation: all training scores so far, including this update (``"running"``; saved
            and restored), or the scores of this update (``"batch"``).
        decay: With ``"running"``: the factor on the weight of older scores after each update. Mean and variance are
            then exponential moving averages, with weights ``decay ** age`` over their sum (for the variance less one,
            as for plain counts), so that the first updates lose their influence; None weights all scores equally.

    Reads and writes ``experience.scores``.
    Source: Zheng et al. 2023, arXiv:2307.04964, section 5.3 (reward scaling); Engstrom et al. 2020,
    arXiv:2005.12729, section 3 (for control tasks, by the deviation of discounted sums).
    """

    reads = ("scores",)

    @constructor
    def __init__(self, statistics: Literal["running", "batch"] = "running", decay: float | None = None) -> None:
        self.statistics = one_of(self, "statistics", statistics, ("running", "batch"))
        self.decay = fraction_or_none(self, "decay", decay)
        if decay is not None and statistics != "running":
            refuse(self, "decay", decay, f"has no effect with statistics={statistics!r}; use statistics='running'")
        self._moments: tuple[float, float, float] = (0, 0.0, 0.0)  # count (or weight), mean, sum of squared deviations

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, RewardScaling, RewardNormalization, why="both would rescale the scores")

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
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
        return {"moments": self._moments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._moments = state_dict["moments"]
