"""Normalise scores to zero mean and unit variance."""

from typing import Any, Literal

import lightning as L
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside
from lit_ppo.constructor import constructor
from lit_ppo.functional import merge_moments
from lit_ppo.validate import number, one_of, positive_or_none, refuse


class RewardNormalization(PPOCallback):
    """Replaces ``scores`` by their z-scores, then clips them; ``raw_scores`` do not change.

    Use it when the scale of the reward is unknown or differs between reward models: ``kl_coef`` and the critic's
    learning rate then have the same meaning for all. ``"batch"`` removes the mean of each batch, ``"running"`` keeps
    differences between batches and follows slowly, ``"given"`` fixes both moments. Costs nothing.

    Args:
        clip: Maximum absolute value of a z-score; None for no bound.
        statistics: Source of mean and standard deviation: the scores of this update (``"batch"``), all training
            scores so far, including this update (``"running"``; saved and restored), or ``mean`` and ``std``
            (``"given"``), for example those of a data set.
        mean: The mean, with ``"given"``.
        std: The standard deviation, with ``"given"``.

    Reads and writes ``experience.scores``.
    Source: Zheng et al. 2023, arXiv:2307.04964, section 5.3 (normalisation and clipping by running statistics).
    """

    reads = ("scores",)

    @constructor
    def __init__(
        self,
        clip: float | None = None,
        statistics: Literal["batch", "running", "given"] = "running",
        mean: float | None = None,
        std: float | None = None,
    ) -> None:
        self.clip = positive_or_none(self, "clip", clip)
        self.statistics = one_of(self, "statistics", statistics, ("batch", "running", "given"))
        for name, value in {"mean": mean, "std": std}.items():
            if (statistics == "given") != (value is not None):
                problem = "give mean and std with statistics='given', and only then"
                refuse(self, name, value, f"statistics={self.statistics!r}; {problem}")
        self.mean = None if mean is None else number(self, "mean", mean)
        self.std = positive_or_none(self, "std", std)
        self._moments: tuple[float, float, float] = (0, 0.0, 0.0)  # count, mean, sum of squared deviations

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, RewardNormalization, why="the scores would already be z-scores")

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        mean, std = self._mean_and_std(experience.scores)
        scores = (experience.scores - mean) / std
        experience.scores = scores if self.clip is None else scores.clamp(-self.clip, self.clip)

    def _mean_and_std(self, scores: Tensor) -> tuple[float, float]:
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        count, mean, m2 = merge_moments(*self._moments, scores)
        if self.statistics == "running":
            self._moments = count, mean, m2
        return mean, (m2 / max(count - 1, 1) + 1e-8) ** 0.5  # equal scores become 0

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self._moments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._moments = state_dict["moments"]
