"""Imitate the best of several responses, in turn with PPO."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require
from lit_ppo.functional import best_of_groups
from lit_ppo.validate import integer


class RejectionSampling(PPOCallback):
    """Makes every ``every``-th update supervised: sample ``k`` responses a prompt, imitate the best of each.

    Use it when some samples are much better than most: imitating them is steadier than a policy gradient and needs no
    values, while PPO's updates between also learn what to avoid. Costs ``k`` samples and scores a prompt in its
    updates, of which one each is trained on; ``minibatch_size`` may be more than are left, and makes one minibatch of
    them then. The other updates are plain PPO, and so are all while the actor is frozen.

    In its updates only the winners go on to whatever comes after in the list and in the update: running statistics,
    controllers and metrics such as ``objective/score`` are of them alone. The critic does not step, as the winners'
    returns would teach it too high values (with ``every`` of 1 it never does: leave it out then); schedules go on.
    The other numbers of optimizer steps (``approx_kl``, ``ratio``, ...) keep their meaning. Losses that callbacks
    before it in the list have made of PPO's are dropped; those behind it find advantages of 0, and may add terms of
    their own. The KL to the reference has no say.

    Args:
        k: Responses to each prompt to choose from, whatever the module's ``samples_per_prompt``.
        every: Updates from one rejection update to the next: of 2, the second, fourth, ...; 1: all of them.

    Reads ``experience.scores`` as callbacks before it in the list have left them, ``experience.group`` and
    ``minibatch.new_logprobs`` (of the sampling temperature); writes ``pl_module.samples_per_prompt`` for its rollouts,
    cuts the experience, and replaces the actor's losses by ``losses["sft"]``, minus the mean log-prob. Logs
    ``rejection/score_gain``: the winners' mean score less that of all. Not for estimators that compare the samples
    of a prompt.
    Source: Touvron et al. 2023, arXiv:2307.09288, section 3.2.3 (rejection sampling fine-tuning, combined with PPO).
    """

    def __init__(self, k: int, every: int = 2) -> None:
        self.k = integer(self, "k", k, at_least=2)
        self.every = integer(self, "every", every)
        self._updates = 0
        self._rejects = False  # in this update
        self._samples_per_prompt: int | None = None  # the module's own, while ours is in force

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what would compare winners with nothing, and a second one."""
        require(self, pl_module, "samples_per_prompt")
        refuse_beside(self, trainer, RejectionSampling, why="both would set samples_per_prompt")
        estimator = getattr(pl_module, "advantages", None)
        if getattr(estimator, "needs_groups", False):
            raise ValueError(
                f"RejectionSampling and {type(estimator).__name__}: one keeps a single sample of each prompt, the "
                "other compares several; use another estimator, or remove the callback"
            )

    def on_rollout_start(self, trainer: L.Trainer, pl_module: PPOModule, prompts: Any) -> None:
        """Ask for ``k`` samples where it is a rejection update's turn."""
        self._updates += 1
        self._rejects = self._updates % self.every == 0 and not getattr(pl_module, "actor_frozen", False)
        if self._rejects:
            if self._samples_per_prompt is None:  # else a rollout has failed, and ours is still in force
                self._samples_per_prompt = pl_module.samples_per_prompt
            pl_module.samples_per_prompt = self.k

    def on_rollout_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Put the module's own number back."""
        if self._samples_per_prompt is not None:
            pl_module.samples_per_prompt, self._samples_per_prompt = self._samples_per_prompt, None

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Keep the best of each prompt."""
        if self._rejects:
            mean = experience.scores.mean()
            experience.keep(best_of_groups(experience.scores, experience.group))
            pl_module.log("rejection/score_gain", experience.scores.mean() - mean)

    def on_actor_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        """Replace PPO's losses by the next-token loss."""
        if self._rejects:
            losses.clear()
            losses["sft"] = -minibatch.mean(minibatch.new_logprobs)
            minibatch.advantages = torch.zeros_like(minibatch.advantages)  # for whoever makes a policy loss anew

    def on_critic_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        """Spare the critic."""
        if self._rejects:
            losses.clear()

    def on_minibatch_end(
        self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike, metrics: dict[str, float]
    ) -> None:
        """Spare it also where a callback behind has put a loss back."""
        if self._rejects and getattr(pl_module, "critic", None) is not None:
            for parameter in pl_module.critic.parameters():
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Updates so far."""
        return {"updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count up again."""
        self._updates = state_dict["updates"]
