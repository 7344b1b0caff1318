"""Limit how far the critic moves in one update."""

from typing import Any

import lightning as L
from torch import Tensor

from lit_ppo.callbacks.base import MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_none, refuse_same_loss
from lit_ppo.callbacks.fields import present
from lit_ppo.constructor import constructor
from lit_ppo.functional import clipped_value_loss, value_loss
from lit_ppo.validate import positive


class ValueClipping(PPOCallback):
    """Replaces the critic's squared error by the larger of it and that of the value clipped to near its old value.

    Use it when the value loss jumps within an update; most PPO recipes for language models include it, although
    studies on control tasks found no gain. Costs nothing. Needs a critic.

    Args:
        clip_range: Maximum change of a value since the rollout, in units of the returns.

    Reads ``minibatch.new_values``, ``values``, ``returns``; writes ``losses["value"]``. Logs
    ``value/clip_fraction``: the fraction of response tokens whose clipped error is the larger one; they get no
    gradient.
    Source: Schulman et al. 2017's code (baselines ``ppo2``); Ziegler et al. 2019, arXiv:1909.08593, its code.
    """

    reads = ("new_values", "values", "returns")

    @constructor
    def __init__(self, clip_range: float = 0.2) -> None:
        self.clip_range = positive(self, "clip_range", clip_range)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_same_loss(self, trainer, ValueClipping)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        refuse_none(self, pl_module, "critic")

    def on_critic_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        values, returns = present(minibatch, "values"), present(minibatch, "returns")
        loss = clipped_value_loss(minibatch.new_values, values, returns, self.clip_range)
        losses["value"] = minibatch.mean(loss)
        has_moved = (minibatch.new_values - values).abs() > self.clip_range  # rounding alone changes losses, too
        is_clipped = has_moved & (loss > value_loss(minibatch.new_values, returns))
        minibatch.log("value/clip_fraction", is_clipped.to(loss.dtype))
