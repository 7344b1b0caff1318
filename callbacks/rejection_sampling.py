"""Alternate PPO with fine-tuning on the best of several responses."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require
from lit_ppo.constructor import constructor
from lit_ppo.functional import best_of_groups
from lit_ppo.validate import integer, samples


class RejectionSampling(PPOCallback):
    """Makes every ``every``-th update supervised: samples ``k`` responses per prompt and imitates the best of each.

    Use it when some samples are much better than most: imitation is steadier than a policy gradient and needs no
    values, while the PPO updates in between also learn what to avoid. Its updates cost ``k`` samples and scores per
    prompt, of which one is trained on; if fewer rows than ``minibatch_size`` are left, they form one minibatch. All
    other updates are plain PPO, and so are all updates while the actor is frozen.

    In its updates only the winners reach later callbacks and the rest of the update: running statistics, controllers
    and metrics such as ``objective/score`` are of the winners. The critic makes no step, since the returns of winners
    would bias its values upwards (with ``every=1`` it never does: omit the critic then); schedules advance. Other
    metrics of optimizer steps (``approx_kl``, ``ratio``, ...) keep their meaning. Losses of earlier callbacks in the
    list are dropped; later callbacks see advantages of 0 and can add their own losses. The KL to the reference has no
    effect.

    Args:
        k: Responses per prompt to choose from, instead of the module's ``samples_per_prompt``.
        every: Updates between rejection updates: with 2, the second, fourth, ... update; with 1, all updates.

    Reads ``experience.scores`` after earlier callbacks in the list, ``experience.group`` and
    ``minibatch.new_logprobs`` (at the sampling temperature); writes ``pl_module.samples_per_prompt`` for its rollouts,
    removes rows of the experience, and replaces the actor's losses by ``losses["sft"]``, minus the mean log-prob. Logs
    ``rejection/score_gain``: the mean score of the winners less that of all. Not for advantage estimators that compare
    the samples of a prompt.
    Source: Touvron et al. 2023, arXiv:2307.09288, section 3.2.3 (rejection sampling fine-tuning, combined with PPO).
    """

    reads = ("scores", "group", "new_logprobs", "advantages")

    @constructor
    def __init__(self, k: int, every: int = 2) -> None:
        self.k = samples(self, "k", k, at_least=2)
        self.every = integer(self, "every", every)
        self._updates = 0
        self._rejects = False  # in this rollout, then in the update from it
        self._samples_per_prompt: int | None = None  # the module's value, while it is replaced

    def waits_for(self, pl_module: Any) -> set[str]:
        has_critic = getattr(pl_module, "critic", None) is not None
        return super().waits_for(pl_module) - (set() if has_critic else {"on_critic_loss", "on_minibatch_end"})

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require(self, pl_module, "samples_per_prompt")
        refuse_beside(self, trainer, RejectionSampling, why="both would set samples_per_prompt")
        estimator = getattr(pl_module, "advantages", None)
        if getattr(estimator, "needs_groups", False):
            raise ValueError(
                f"RejectionSampling and {type(estimator).__name__}: the first keeps one sample per prompt, the second "
                "compares several; use another estimator, or remove the callback"
            )

    def on_rollout_start(self, trainer: L.Trainer, pl_module: PPOModule, prompts: Any) -> None:
        self._updates += 1
        self._rejects = self._updates % self.every == 0 and not getattr(pl_module, "actor_frozen", False)
        if self._rejects:
            if self._samples_per_prompt is None:  # else a rollout has failed, and it is still replaced
                self._samples_per_prompt = pl_module.samples_per_prompt
            pl_module.samples_per_prompt = self.k

    def on_rollout_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        getattr(experience, "extras", {})["rejects"] = self._rejects  # another rollout may come before its update
        self.restore(pl_module)

    def restore(self, pl_module: Any) -> None:
        if self._samples_per_prompt is not None:
            pl_module.samples_per_prompt, self._samples_per_prompt = self._samples_per_prompt, None

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        self._rejects = getattr(experience, "extras", {}).get("rejects", self._rejects)
        if self._rejects:
            mean, best = experience.scores.mean(), best_of_groups(experience.scores, experience.group)
            if len(best) == len(experience.scores):
                raise ValueError(
                    f"RejectionSampling(k={self.k}): each of the {len(best)} responses is alone in its group; sample "
                    "samples_per_prompt responses to a prompt and give them the same number in experience.group"
                )
            experience.keep(best)
            pl_module.log("rejection/score_gain", experience.scores.mean() - mean)

    def on_actor_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        if self._rejects:
            losses.clear()
            losses["sft"] = -minibatch.mean(minibatch.new_logprobs)
            minibatch.advantages = torch.zeros_like(minibatch.advantages)  # for later callbacks

    def on_critic_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        if self._rejects:
            losses.clear()

    def on_minibatch_end(
        self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike, metrics: dict[str, float]
    ) -> None:
        if self._rejects and getattr(pl_module, "critic", None) is not None:  # a later callback may have added a loss
            for parameter in pl_module.critic.parameters():
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates = state_dict["updates"]
