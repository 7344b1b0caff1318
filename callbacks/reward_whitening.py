"""Scale token rewards to unit variance."""

from typing import Any

import lightning as L
import torch

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require_token_rewards
from lit_ppo.constructor import constructor
from lit_ppo.functional import scale
from lit_ppo.validate import boolean, integer


class RewardWhitening(PPOCallback):
    """Scales the deviations of token ``rewards`` from their mean to unit variance over response tokens; keeps the mean.

    Use it when scores and KL penalty together change in size during training and the critic cannot keep up. It acts
    on both at once, so ``kl_coef`` still sets their relative weight. Since the mean is kept and one score stands among
    many small penalties, tokens without a score get a nonzero reward. Costs nothing.

    Args:
        rows: Compute the moments over this many consecutive responses at a time; the last group may be smaller. None
            computes them over the full update.
        unbiased: Divide the sum of squares by the number of tokens minus one.

    Reads and writes ``experience.rewards``, 0 where masked.
    Source: Ziegler et al. 2019, arXiv:1909.08593, its code (``whiten(rewards, shift_mean=False)`` with
    ``unbiased=False``, on each rank's minibatch); TRL's ``whiten_rewards`` (on each rank's batch).
    """

    reads = ("rewards", "response_mask")

    @constructor
    def __init__(self, rows: int | None = None, unbiased: bool = True) -> None:
        self.rows = None if rows is None else integer(self, "rows", rows)
        self.unbiased = boolean(self, "unbiased", unbiased)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require_token_rewards(self, pl_module)
        refuse_beside(self, trainer, RewardWhitening, why="the rewards would already have unit variance")

    def on_rewards(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        rows = self.rows or len(experience.rewards)
        groups = zip(experience.rewards.split(rows), experience.response_mask.split(rows), strict=True)
        experience.rewards = torch.cat([scale(rewards, mask, self.unbiased) for rewards, mask in groups])
