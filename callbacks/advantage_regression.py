"""Fit the policy's log-ratios to advantages by least squares, on earlier responses, too."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_ppo.callbacks.advantage_normalization import AdvantageNormalization
from lit_ppo.callbacks.base import ExperienceLike, MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, refuse_same_loss, require, require_model
from lit_ppo.callbacks.counterfactual_actions import CounterfactualActions
from lit_ppo.callbacks.critic_warmup import CriticWarmup
from lit_ppo.callbacks.dual_clip import DualClip
from lit_ppo.callbacks.fields import FIELDS, present
from lit_ppo.callbacks.importance_correction import ImportanceCorrection
from lit_ppo.callbacks.kl_early_stop import KLEarlyStop
from lit_ppo.callbacks.kl_loss import KLLoss
from lit_ppo.callbacks.learning_rate_adaptation import LearningRateAdaptation
from lit_ppo.callbacks.least_squares_critic import LeastSquaresCritic
from lit_ppo.callbacks.other_tokens import plain_advantages, refuse_tolerance, solver_of, values_after
from lit_ppo.callbacks.reference_update import ReferenceUpdate
from lit_ppo.callbacks.rejection_sampling import RejectionSampling
from lit_ppo.callbacks.replay_buffer import ReplayBuffer
from lit_ppo.callbacks.reward_normalization import RewardNormalization
from lit_ppo.callbacks.reward_scaling import RewardScaling
from lit_ppo.callbacks.reward_whitening import RewardWhitening
from lit_ppo.callbacks.value_clipping import ValueClipping
from lit_ppo.callbacks.value_normalization import ValueNormalization
from lit_ppo.constructor import constructor
from lit_ppo.functional import advantage_regression_loss
from lit_ppo.validate import integer, refuse


class AdvantageRegression(PPOCallback):
    """Replaces PPO's loss: fits log-ratios to the reference by least squares to advantages over ``kl_coef``.

    Use it instead of ``CounterfactualActions``, with ``LeastSquaresCritic`` and a critic that knows the reward, where
    responses are scarce and steps are cheap. At each place it compares ``n`` other tokens, samples of the policy, with
    the response's own. What it fits does not depend on the policy that sampled, so responses of earlier updates serve
    again: each step has ``replay`` of them for each new one. Choose a small ``minibatch_size``, for many steps.

    Costs a forward of the critic over up to ``n`` tokens for each response token, and ``1 + replay`` times the actor's
    forwards and backwards. Keeps tokens and numbers of the last ``memory`` updates in host memory, and saves them.
    ``clip_range`` has no effect. The metrics of a step, such as ``approx_kl``, are of all its responses, earlier ones
    included. Without ``LeastSquaresCritic`` the critic is trained on the returns of earlier responses, too. Their
    advantages have the KL of later tokens with the ``kl_coef`` of their update, which ``AdaptiveKL`` may have changed.

    A stop token, and a token behind which no more fit, has no value to go by: it counts only as a response's own. A
    place where no other token counts, such as the last one that fits, teaches nothing.

    Args:
        n: Other tokens at each place.
        replay: Responses of earlier updates for each new one in a step; 0: none.
        memory: Updates from which they come.

    Reads ``experience.values``, ``kl``, ``rewards`` and what ``pl_module.n_actions``, which it sets, leaves in
    ``extras``. Writes ``losses["policy"]``. Needs a critic, a reference, ``kl_estimator="k1"`` and ``kl_coef`` above 0.
    Source: this project, measured in ``docs/explanation/regression.md``; Gao et al. 2024, arXiv:2404.16767
    (log-ratios regressed on relative rewards, there of full responses).
    """

    corrects_sampling = True  # what is fitted does not depend on what sampled
    reads = tuple(FIELDS)  # rows of earlier updates have them all

    @constructor
    def __init__(self, n: int = 8, replay: int = 3, memory: int = 16) -> None:
        self.n = integer(self, "n", n)
        self.replay = integer(self, "replay", replay, at_least=0)
        self._buffer = ReplayBuffer(integer(self, "memory", memory))
        self._solver: LeastSquaresCritic | None = None  # of values, if there is one

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require(self, pl_module, "kl_coef", "n_actions")
        refuse_same_loss(self, trainer, AdvantageRegression, CounterfactualActions, DualClip, RejectionSampling)
        refuse_tolerance(self, pl_module)
        if pl_module.kl_coef <= 0:
            refuse(pl_module, "kl_coef", pl_module.kl_coef, "AdvantageRegression divides by it; it must be above 0")
        if (kind := getattr(pl_module, "kl_estimator", "k1")) != "k1":
            refuse(pl_module, "kl_estimator", kind, "AdvantageRegression fits log-ratios, which only 'k1' penalises")
        refuse_beside(self, trainer, RewardWhitening, why="other tokens have no whitened rewards")
        refuse_beside(self, trainer, AdvantageNormalization, why="a fit needs advantages in units of the reward")
        refuse_beside(self, trainer, ImportanceCorrection, why="a fit does not depend on what sampled")
        if self.replay:
            stops = (KLEarlyStop, LearningRateAdaptation)
            refuse_beside(self, trainer, *stops, why="approx_kl counts earlier responses, too, unless replay=0")
            refuse_beside(self, trainer, ReferenceUpdate, why="earlier responses have another reference's log-probs")
            of_critic = (CriticWarmup, ValueClipping, ValueNormalization)
            refuse_beside(
                self, trainer, *of_critic, why="the critic's loss has earlier responses, too, unless replay=0"
            )
        self._solver = solver_of(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if self.replay and isinstance(callback, KLLoss) and callback.kind != "exact":
                problem = "AdvantageRegression adds responses that other policies sampled; use 'exact', or replay=0"
                refuse(callback, "kind", callback.kind, problem)
            scales = isinstance(callback, (RewardNormalization, RewardScaling))
            if self.replay and scales and callback.statistics != "given":
                problem = (
                    "AdvantageRegression adds earlier responses, with scores in other units; use "
                    "RewardNormalization(statistics='given'), or replay=0"
                )
                refuse(callback, "statistics", callback.statistics, problem)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        require_model(self, pl_module, "critic")
        require_model(self, pl_module, "reference")
        pl_module.n_actions, pl_module.replay = self.n, self.replay

    def restore(self, pl_module: Any) -> None:
        pl_module.n_actions = pl_module.replay = 0

    @torch.no_grad()
    def on_advantages(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        values, extras = present(experience, "values"), experience.extras
        after = values_after(self, self._solver, experience)
        own = plain_advantages(pl_module, experience) + pl_module.kl_coef * experience.kl  # the fit has its own KL
        others = getattr(getattr(pl_module, "advantages", None), "gamma", 1.0) * after - values.unsqueeze(-1)
        counts = torch.cat([experience.response_mask.unsqueeze(-1), extras["action_mask"]], dim=-1)
        targets = torch.cat([own.unsqueeze(-1), others], dim=-1)
        extras |= {"action_targets": targets.masked_fill(~counts, 0.0), "action_counts": counts}

    def on_minibatch_start(self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike) -> None:
        if self.replay:
            n = self.replay * len(minibatch.response_mask)
            self._buffer.extend(minibatch, n, getattr(pl_module, "seed", 0) or 0)

    def on_actor_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        extras = minibatch.extras
        if "action_targets" not in extras:  # the module fired no on_advantages, which ends its first update
            return
        log_ratios = extras["new_action_logprobs"] - extras["action_ref_logprobs"]
        loss = advantage_regression_loss(
            log_ratios, extras["action_targets"], extras["action_counts"], pl_module.kl_coef
        )
        losses["policy"] = minibatch.mean(loss)

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        extras = experience.extras
        if not self.replay or "action_targets" not in extras:
            return
        numbers = (extras["action_targets"], extras["action_ref_logprobs"], experience.logprobs)
        if all(bool(x.isfinite().all()) for x in numbers):  # else the steps were skipped, and later ones would be
            self._buffer.add(experience)

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n, **self._buffer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["n"] != self.n:
            problem = (
                f"the earlier responses of the checkpoint have {state_dict['n']} other tokens at each place; keep n"
            )
            refuse(self, "n", self.n, problem)
        self._buffer.load_state_dict(state_dict)
