"""Learn at each place from other tokens, too, by what the critic says of them."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_ppo.callbacks.advantage_normalization import AdvantageNormalization
from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_behind, refuse_beside, refuse_same_loss, require, require_model
from lit_ppo.callbacks.dual_clip import DualClip
from lit_ppo.callbacks.fields import present
from lit_ppo.callbacks.least_squares_critic import LeastSquaresCritic
from lit_ppo.callbacks.rejection_sampling import RejectionSampling
from lit_ppo.callbacks.reward_whitening import RewardWhitening
from lit_ppo.constructor import constructor
from lit_ppo.functional import affine_map, counterfactual_advantages, policy_loss
from lit_ppo.validate import integer, refuse


class CounterfactualActions(PPOCallback):
    """Adds to each response token ``n`` other tokens that the policy could have chosen, with advantages by the critic.

    Use it with ``LeastSquaresCritic`` and a reward model where responses are scarce. With good values most noise of the
    gradient comes from the one token that was sampled at each place. Other tokens need no responses and no scores of
    their own, only the critic's value behind them: an expectation over the policy instead of one sample.

    Costs a forward of the critic over ``n`` tokens for each response token, and one more forward of the actor. Put it
    after ``AdvantageNormalization``. Without ``LeastSquaresCritic`` the critic's own values are used.

    A stop token, and a token behind which no more fit, has no value to go by: there only the response's own token
    counts, with its advantage from GAE as everywhere.

    Args:
        n: Other tokens at each place, samples of the policy.

    Reads ``experience.values``, ``returns`` and ``advantages``, ``minibatch.logprobs``. Writes ``extras`` and
    ``losses["policy"]``, the mean over the tokens of each place.
    Source: this project, measured in ``docs/explanation/learning.md``; Ciosek and Whiteson 2018, arXiv:1706.05374
    (policy gradients with the expectation over actions).
    """

    reads = ("values", "response_mask", "returns", "advantages", "response_ids", "logprobs")

    @constructor
    def __init__(self, n: int = 8) -> None:
        self.n = integer(self, "n", n)
        self._solver: LeastSquaresCritic | None = None  # of values, if there is one

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require(self, pl_module, "kl_coef", "clip_range", "sample_actions", "action_logprobs")
        refuse_same_loss(self, trainer, CounterfactualActions, DualClip, RejectionSampling)
        refuse_beside(self, trainer, RewardWhitening, why="other tokens have no whitened rewards")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LeastSquaresCritic):
                self._solver = callback
            if isinstance(callback, AdvantageNormalization):
                refuse_behind(callback, trainer, CounterfactualActions, why="it sets the scale of other tokens, too")
                if callback.scope != "batch":
                    refuse(callback, "scope", callback.scope, "CounterfactualActions needs one scale for the batch")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        require_model(self, pl_module, "critic")

    @torch.no_grad()
    def on_advantages(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        values, mask, solver = present(experience, "values"), experience.response_mask, self._solver
        estimator: Any = getattr(pl_module, "advantages", None)
        found = pl_module.sample_actions(experience, self.n, 1 if solver is None else solver.n_states)
        after = found["values"] if solver is None else solver.values_after(found["values"], found["states"])
        advantages = counterfactual_advantages(
            values, after, found["logprobs"], found.get("ref_logprobs"), kl_coef=pl_module.kl_coef,
            kind=getattr(pl_module, "kl_estimator", "k1"), gamma=getattr(estimator, "gamma", 1.0),
        )  # fmt: skip
        plain = present(experience, "returns") - values if estimator is None else estimator(experience)[0]
        scale, shift = affine_map(plain[mask], experience.advantages[mask])
        counts = mask.unsqueeze(-1) & ~found["ends"]
        longest = mask.shape[1] if solver is None else solver.longest
        counts[:, longest - 1 :] = False
        experience.extras |= {
            "action_ids": found["ids"],
            "action_logprobs": found["logprobs"],
            "action_advantages": (scale * advantages + shift).masked_fill(~counts, 0.0),
            "action_counts": counts,
        }

    def on_actor_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        if "action_ids" not in minibatch.extras:  # the module fired no on_advantages, which ends its first update
            return
        ids, old, advantages, counts = (minibatch.extras[f"action_{name}"] for name in NAMES)
        ids = torch.cat([minibatch.response_ids.unsqueeze(-1), ids], dim=-1)
        old = torch.cat([minibatch.logprobs.unsqueeze(-1), old], dim=-1)
        advantages = torch.cat([minibatch.advantages.unsqueeze(-1), advantages], dim=-1)
        counts = torch.cat([minibatch.response_mask.unsqueeze(-1), counts], dim=-1)
        loss = policy_loss(pl_module.action_logprobs(minibatch, ids), old, advantages, pl_module.clip_range)
        n_tokens = counts.sum(-1).clamp(min=1)
        losses["policy"] = minibatch.mean(loss.masked_fill(~counts, 0.0).sum(-1) / n_tokens)


NAMES = ("ids", "logprobs", "advantages", "counts")  # of the entries of extras, after "action_"
