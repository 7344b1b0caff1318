"""Add a KL term to the actor's loss."""

from typing import Any, Literal

import lightning as L
from torch import Tensor

from lit_ppo.callbacks.base import MinibatchLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, refuse_none, require
from lit_ppo.callbacks.fields import present
from lit_ppo.constructor import constructor
from lit_ppo.functional import KLEstimator, kl_estimate
from lit_ppo.validate import one_of, positive, refuse


class KLLoss(PPOCallback):
    """Adds ``coef`` times the mean KL of response tokens to the actor's loss.

    Use it instead of, or together with, the KL in the token rewards (with ``kl_coef=0`` this is the only one): it acts
    on every token directly, whatever the advantages and their normalisation make of the rewards. ``to="old"`` is PPO's
    other form, a penalty on the KL to the policy that sampled instead of clipping (``clip_range=None`` on the module).
    Costs nothing, except ``"exact"``: one more forward of the actor and one of the reference per micro-batch, and the
    memory of that forward.

    Args:
        coef: Weight of the KL, in units of loss per nat.
        kind: ``"k2"`` has the expected gradient of KL(policy || reference) while the policy is the one that sampled;
            ``"k3"`` that of KL(reference || policy); ``"exact"`` sums over the vocabulary, which removes the noise
            of the sampled token. For the old policy k3 is unbiased, and k2 nearly so.
        to: ``"reference"``: KL(policy || reference). ``"old"``: KL(old || policy), where old is the policy that
            sampled.

    Reads ``minibatch.new_logprobs`` and ``ref_logprobs`` or ``logprobs``; adds ``losses["kl"]``. Logs
    ``policy/kl_loss``, including ``coef``. Needs a reference, except for ``to="old"``.
    Source: Schulman et al. 2017, arXiv:1707.06347, section 4 (``"old"``); Schulman 2020, "Approximating KL
    divergence", http://joschu.net/blog/kl-approx.html (k2, k3); Shao et al. 2024, arXiv:2402.03300, section 4.1 (a KL
    to the reference in the loss).
    """

    reads = ("new_logprobs", "ref_logprobs", "logprobs")

    @constructor
    def __init__(
        self,
        coef: float,
        kind: KLEstimator | Literal["exact"] = "k2",
        to: Literal["reference", "old"] = "reference",
    ) -> None:
        self.coef = positive(self, "coef", coef)
        if isinstance(kind, str) and kind == "k1":
            problem = "its expected gradient is zero until the policy changes, so as a loss it is noise; "
            refuse(self, "kind", kind, problem + "use 'k2', 'k3' or 'exact'")
        self.kind = one_of(self, "kind", kind, ("k2", "k3", "exact"))
        self.to = one_of(self, "to", to, ("reference", "old"))
        if kind == "exact" and to == "old":
            problem = "with to='old' only the log-probs of the sampled tokens are available; use 'k2' or 'k3'"
            refuse(self, "kind", kind, problem)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self.kind == "exact":
            require(self, pl_module, "exact_kl")
        refuse_beside(self, trainer, KLLoss, why="both would set losses['kl']")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.to == "reference":
            refuse_none(self, pl_module, "reference")

    def on_actor_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        losses["kl"] = self.coef * minibatch.mean(self._kl(pl_module, minibatch))

    def _kl(self, pl_module: PPOModule, minibatch: MinibatchLike) -> Tensor:
        if self.kind == "exact":
            return pl_module.exact_kl(minibatch)
        kind: KLEstimator = "k2" if self.kind == "k2" else "k3"
        if self.to == "old":  # which sampled the tokens
            return kl_estimate(minibatch.logprobs, minibatch.new_logprobs, kind)
        return kl_estimate(minibatch.new_logprobs, present(minibatch, "ref_logprobs"), kind)
