"""Bring token rewards to unit variance."""

from typing import Any

import lightning as L
import torch

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require_token_rewards
from lit_ppo.functional import scale
from lit_ppo.validate import integer


class RewardWhitening(PPOCallback):
    """Scales the deviations of token ``rewards`` from their mean to unit variance over response tokens; the mean stays.

    Use it when scores and KL penalty together change in size during training and the critic cannot keep up. It acts
    on both at once, so that ``kl_coef`` still weighs one against the other. As the mean is kept and one score sits
    among many small penalties, tokens without a score get a reward other than 0. Costs nothing.

    Args:
        rows: Take the moments over this many consecutive responses at a time, a last smaller group included; None
            takes them over the whole update.
        unbiased: Divide squares by one less than the number of tokens.

    Reads and writes ``experience.rewards``, 0 where masked.
    Source: Ziegler et al. 2019, arXiv:1909.08593, its code (``whiten(rewards, shift_mean=False)`` with
    ``unbiased=False``, on each rank's minibatch); TRL's ``whiten_rewards`` (on each rank's batch).
    """

    def __init__(self, rows: int | None = None, unbiased: bool = True) -> None:
        self.rows = None if rows is None else integer(self, "rows", rows)
        self.unbiased = unbiased

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a second whitening, and an estimator that would not see it."""
        require_token_rewards(self, pl_module)
        refuse_beside(self, trainer, RewardWhitening, why="the rewards would have unit variance already")

    def on_rewards(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Scale the rewards."""
        rows = self.rows or len(experience.rewards)
        groups = zip(experience.rewards.split(rows), experience.response_mask.split(rows), strict=True)
        experience.rewards = torch.cat([scale(rewards, mask, self.unbiased) for rewards, mask in groups])
