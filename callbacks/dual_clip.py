"""Bound what a token with a negative advantage can weigh."""

from typing import Any

import lightning as L
from torch import Tensor

from lit_ppo.callbacks.base import MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_same_loss, require
from lit_ppo.functional import dual_clip_policy_loss, policy_loss
from lit_ppo.validate import positive


class DualClip(PPOCallback):
    """Bounds the policy's objective at ``c`` times the advantage where that is negative.

    Use it where the policy moves far from the one that sampled (many passes, large rates, old samples): the clipped
    objective has no lower bound, and a token that became ten times as likely though it was bad has ten times the
    weight of any other. Costs nothing.

    Args:
        c: Ratio of probabilities from which on such a token gets no gradient; over 1.

    Reads ``minibatch.new_logprobs``, ``logprobs``, ``advantages``, and ``clip_range``; writes ``losses["policy"]``.
    Logs ``policy/dual_clip_fraction``: the share of response tokens on which the bound acts.
    Source: Ye et al. 2020, arXiv:1912.09729, its section on dual-clip PPO.
    """

    def __init__(self, c: float = 3.0) -> None:
        if not positive(self, "c", c) > 1:
            raise ValueError(f"DualClip(c={c!r}): must be over 1, the ratio of an unchanged policy; the paper has 3")
        self.c = c

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module whose clip range is unknown, and a second callback that replaces the policy loss."""
        require(self, pl_module, "clip_range")
        refuse_same_loss(self, trainer, DualClip)

    def on_actor_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        """Replace the policy loss."""
        ours = minibatch.new_logprobs, minibatch.logprobs, minibatch.advantages, pl_module.clip_range
        loss = dual_clip_policy_loss(*ours, c=self.c)
        losses["policy"] = minibatch.mean(loss)
        minibatch.log("policy/dual_clip_fraction", (loss < policy_loss(*ours)).to(loss.dtype))
