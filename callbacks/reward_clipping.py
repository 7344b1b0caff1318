"""Clip the scores."""

from typing import Any

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside
from lit_ppo.constructor import constructor
from lit_ppo.validate import positive


class RewardClipping(PPOCallback):
    """Clips ``scores`` to between ``-limit`` and ``limit``; ``raw_scores`` do not change.

    Use it when a few extreme scores dominate an update, such as those of a reward model far from its training data.
    After ``RewardNormalization`` or ``RewardScaling`` in the list of callbacks, ``limit`` is in standard deviations.
    Costs nothing.

    Args:
        limit: Maximum absolute value of a score.

    Reads and writes ``experience.scores``. Logs ``reward/clipped_fraction``: the fraction of responses whose score was
    clipped.
    Source: Mnih et al. 2015, doi:10.1038/nature14236, methods (to 1); Zheng et al. 2023, arXiv:2307.04964,
    section 5.3 (after normalisation).
    """

    reads = ("scores",)

    @constructor
    def __init__(self, limit: float) -> None:
        self.limit = positive(self, "limit", limit)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, RewardClipping, why="only the smaller limit would have an effect")

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        is_beyond = experience.scores.abs() > self.limit
        experience.scores = experience.scores.clamp(-self.limit, self.limit)
        pl_module.log("reward/clipped_fraction", float(is_beyond.float().mean()))
