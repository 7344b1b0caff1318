"""Learn at each place from other tokens, too, by what the critic says of them."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_ppo.callbacks.advantage_normalization import AdvantageNormalization
from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_behind, refuse_beside, refuse_same_loss, require, require_model
from lit_ppo.callbacks.dual_clip import DualClip
from lit_ppo.callbacks.fields import extra, present
from lit_ppo.callbacks.least_squares_critic import LeastSquaresCritic
from lit_ppo.callbacks.other_tokens import plain_advantages, refuse_tolerance, solver_of, values_after
from lit_ppo.callbacks.rejection_sampling import RejectionSampling
from lit_ppo.callbacks.reward_whitening import RewardWhitening
from lit_ppo.constructor import constructor
from lit_ppo.functional import affine_map, counterfactual_advantages, policy_loss, whiten
from lit_ppo.validate import integer, refuse


class CounterfactualActions(PPOCallback):
    """Adds to each response token ``n`` other tokens that the policy could have chosen, with advantages by the critic.

    Use it with ``LeastSquaresCritic`` and a reward model where responses are scarce. With good values most noise of the
    gradient comes from the one token that was sampled at each place. Other tokens need no responses and no scores of
    their own, only the critic's value behind them: an expectation over the policy instead of one sample.

    Costs a forward of the critic over up to ``n`` tokens for each response token. Put it after
    ``AdvantageNormalization``. Without ``LeastSquaresCritic`` the critic's own values are used.

    A stop token, and a token behind which no more fit, has no value to go by: there only the response's own token
    counts, with its advantage from GAE as everywhere.

    Args:
        n: Other tokens at each place, samples of the policy.

    Reads ``experience.values``, ``returns``, ``advantages`` and what ``pl_module.n_actions``, which it sets, leaves in
    ``extras``. Writes ``losses["policy"]``, the mean over the tokens of each place.
    Source: this project, measured in ``docs/explanation/learning.md``; Ciosek and Whiteson 2018, arXiv:1706.05374
    (policy gradients with the expectation over actions).
    """

    reads = ("values", "response_mask", "returns", "advantages")

    @constructor
    def __init__(self, n: int = 8) -> None:
        self.n = integer(self, "n", n)
        self._solver: LeastSquaresCritic | None = None  # of values, if there is one
        self._normalization: AdvantageNormalization | None = None  # of advantages

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require(self, pl_module, "kl_coef", "clip_range", "n_actions")
        refuse_same_loss(self, trainer, CounterfactualActions, DualClip, RejectionSampling)
        refuse_tolerance(self, pl_module)
        refuse_beside(self, trainer, RewardWhitening, why="other tokens have no whitened rewards")
        self._solver, self._normalization = solver_of(trainer), None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AdvantageNormalization):
                refuse_behind(callback, trainer, CounterfactualActions, why="it sets the scale of other tokens, too")
                if callback.scope != "batch":
                    refuse(callback, "scope", callback.scope, "CounterfactualActions needs one scale for the batch")
                self._normalization = callback

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        require_model(self, pl_module, "critic")
        pl_module.n_actions = self.n

    def restore(self, pl_module: Any) -> None:
        pl_module.n_actions = 0

    @torch.no_grad()
    def on_advantages(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        values, mask, extras = present(experience, "values"), experience.response_mask, experience.extras
        logprobs, ref_logprobs = extra(self, experience, "action_logprobs"), extras.get("action_ref_logprobs")
        after = values_after(self, self._solver, experience)
        estimator: Any = getattr(pl_module, "advantages", None)
        advantages = counterfactual_advantages(
            values, after, logprobs[..., 1:], None if ref_logprobs is None else ref_logprobs[..., 1:],
            kl_coef=pl_module.kl_coef, kind=getattr(pl_module, "kl_estimator", "k1"),
            gamma=getattr(estimator, "gamma", 1.0),
        )  # fmt: skip
        plain, changed = plain_advantages(pl_module, experience), experience.advantages
        clip = None if self._normalization is None else self._normalization.clip
        if self._normalization is not None and clip is not None:
            changed = whiten(plain, mask, self._normalization.unbiased)  # the scale before clipping
        scale, shift = affine_map(plain[mask], changed[mask])
        advantages = scale * advantages + shift
        advantages = advantages if clip is None else advantages.clamp(-clip, clip)
        extras["action_advantages"] = advantages.masked_fill(~extras["action_mask"], 0.0)

    def on_actor_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        extras = minibatch.extras
        if "action_advantages" not in extras:  # the module fired no on_advantages, which ends its first update
            return
        advantages = torch.cat([minibatch.advantages.unsqueeze(-1), extras["action_advantages"]], dim=-1)
        counts = torch.cat([minibatch.response_mask.unsqueeze(-1), extras["action_mask"]], dim=-1)
        loss = policy_loss(extras["new_action_logprobs"], extras["action_logprobs"], advantages, pl_module.clip_range)
        loss = loss.masked_fill(~counts, 0.0)
        losses["policy"] = minibatch.mean(loss.sum(-1) / counts.sum(-1).clamp(min=1))
