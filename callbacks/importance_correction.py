"""Correct the policy loss for samples that another program drew."""

from typing import Any, Literal

import lightning as L
import torch

from lit_ppo.callbacks.base import MinibatchLike, PPOCallback
from lit_ppo.callbacks.checks import refuse_beside
from lit_ppo.constructor import constructor
from lit_ppo.functional import importance_weights
from lit_ppo.validate import one_of, positive


class ImportanceCorrection(PPOCallback):
    """Weighs the policy loss by the probability of each token in training over that in sampling, up to ``cap``.

    Use it when an engine such as ``VLLMEngine`` samples: its numbers differ a little from those of the training
    forward, so its samples are a little off-policy. Without an engine all weights are 1. Costs nothing.

    Args:
        cap: Largest weight. Yao et al. find 2 to 10 to work alike.
        level: ``"token"`` has less variance; ``"sequence"`` weighs all tokens of a response by its probability ratio,
            which is unbiased, but for long responses often at the cap or near 0.
        mode: ``"truncate"`` lowers larger weights to ``cap``; ``"mask"`` sets them to 0.

    Reads ``minibatch.logprobs``, ``sampling_logprobs`` and ``response_mask``; writes ``minibatch.advantages`` times the
    weights, which multiplies the policy loss. Logs ``policy/importance_weight`` and
    ``policy/importance_capped_fraction``, the fraction of response tokens over the cap.
    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training",
    https://fengyao.notion.site/off-policy-rl (token, truncate); Liu et al. 2025, "When speed kills stability",
    https://richardli.xyz/rl-collapse (sequence, mask).
    """

    reads = ("logprobs", "sampling_logprobs", "response_mask", "advantages")
    corrects_sampling = True  # LitPPO(rollout_ahead=1) needs such a callback

    @constructor
    def __init__(
        self,
        cap: float = 2.0,
        level: Literal["token", "sequence"] = "token",
        mode: Literal["truncate", "mask"] = "truncate",
    ) -> None:
        self.cap = positive(self, "cap", cap)
        self.level = one_of(self, "level", level, ("token", "sequence"))
        self.mode = one_of(self, "mode", mode, ("truncate", "mask"))

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, ImportanceCorrection, why="both would weigh the policy loss")

    def on_minibatch_start(self, trainer: L.Trainer, pl_module: Any, minibatch: MinibatchLike) -> None:
        old, sampled, mask = minibatch.logprobs, minibatch.sampling_logprobs, minibatch.response_mask
        if sampled is None:  # the policy itself sampled
            sampled = old
        weights = importance_weights(old, sampled, mask, self.cap, self.level, self.mode)
        uncapped = importance_weights(old, sampled, mask, torch.inf, self.level)
        minibatch.advantages = minibatch.advantages * weights
        minibatch.log("policy/importance_weight", weights)
        minibatch.log("policy/importance_capped_fraction", (uncapped > self.cap).to(weights.dtype))
