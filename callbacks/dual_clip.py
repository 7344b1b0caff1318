"""Bound the weight of tokens with a negative advantage."""

from typing import Any

import lightning as L
from torch import Tensor

from lit_ppo.callbacks.base import MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_same_loss, require
from lit_ppo.constructor import constructor
from lit_ppo.functional import dual_clip_policy_loss, policy_loss
from lit_ppo.validate import number


class DualClip(PPOCallback):
    """Bounds the policy objective from below by ``c`` times the advantage, where the advantage is negative.

    Use it when the policy moves far from the policy that sampled (many epochs, large learning rates, old samples): the
    clipped objective has no lower bound, so a bad token that became ten times as likely has ten times the weight of
    any other. Costs nothing.

    Args:
        c: Probability ratio above which such a token gets no gradient; above 1. The paper uses 3.

    Reads ``minibatch.new_logprobs``, ``logprobs``, ``advantages``, and ``clip_range``; writes ``losses["policy"]``.
    Logs ``policy/dual_clip_fraction``: the fraction of response tokens where the bound is active.
    Source: Ye et al. 2020, arXiv:1912.09729, its section on dual-clip PPO.
    """

    reads = ("new_logprobs", "logprobs", "advantages")

    @constructor
    def __init__(self, c: float = 3.0) -> None:
        self.c = number(self, "c", c, above=1)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require(self, pl_module, "clip_range")
        refuse_same_loss(self, trainer, DualClip)

    def on_actor_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        ours = minibatch.new_logprobs, minibatch.logprobs, minibatch.advantages, pl_module.clip_range
        loss = dual_clip_policy_loss(*ours, c=self.c)
        losses["policy"] = minibatch.mean(loss)
        minibatch.log("policy/dual_clip_fraction", (loss < policy_loss(*ours)).to(loss.dtype))
