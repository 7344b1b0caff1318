"""Advantage estimators: from token rewards to the numbers that weight the policy's loss."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from lit_ppo.constructor import constructor
from lit_ppo.functional import gae, group_relative_advantages, leave_one_out_advantages, reinforce_advantages
from lit_ppo.validate import boolean, number, number_or_none, refuse


class AdvantageEstimator(ABC):
    """Base of the estimators for ``LitPPO(advantages=...)``; configurations use their short names.

    Class attributes say what an estimator reads. ``needs_values``: ``experience.values``, which a critic provides.
    ``needs_groups``: several responses to each prompt, which it compares. ``needs_rewards``: token rewards; otherwise
    it reads only scores.
    """

    needs_values: bool
    needs_groups = False
    needs_rewards = True

    @abstractmethod
    def __call__(self, experience: Any) -> tuple[Tensor, Tensor | None]:
        """Advantages and, for the critic, returns; (B, T), 0 where masked."""


def check_estimator(owner: object, advantages: Any, samples_per_prompt: int, kl_coef: float) -> None:
    """Check the values that an estimator depends on. Callbacks may change them, so every update checks them again.

    Args:
        owner: The module.
        advantages: The estimator.
        samples_per_prompt: Current value.
        kl_coef: Current value.

    Raises:
        ValueError: Names the estimator and the value.
    """
    estimator = type(advantages).__name__
    if getattr(advantages, "needs_groups", False) and samples_per_prompt < 2:
        refuse(
            owner, "samples_per_prompt", samples_per_prompt,
            f"{estimator} compares the responses to one prompt; sample at least 2, or use another estimator",
        )  # fmt: skip
    if not getattr(advantages, "needs_rewards", True) and kl_coef > 0:
        refuse(
            owner, "kl_coef", kl_coef,
            f"{estimator} reads only scores, so a KL in the token rewards would have no effect; set kl_coef to 0 and "
            "put the KL into the loss with lit_ppo.callbacks.KLLoss",
        )  # fmt: skip


class GAE(AdvantageEstimator):
    """Generalised advantage estimation; the critic learns the returns, advantages + values.

    Args:
        gamma: Discount per token. 1 (no discount) is usual for language: the score comes with the last token.
        lam: 1 is Monte Carlo (no bias, high variance), 0 is one-step (relies on the critic alone).
        value_lam: The same for the returns that the critic learns; None: ``lam``. With 1 the critic learns from scores
            alone, whatever it predicts itself, while a low ``lam`` keeps the noise of later tokens out of advantages.

    Reads ``experience.rewards``, ``values`` and ``response_mask``.
    Source: Schulman et al. 2015, arXiv:1506.02438; Yuan et al. 2025, arXiv:2503.01491 (``value_lam``).
    """

    needs_values = True

    @constructor
    def __init__(self, gamma: float = 1.0, lam: float = 0.95, value_lam: float | None = None) -> None:
        self.gamma = number(self, "gamma", gamma, at_least=0, at_most=1)
        self.lam = number(self, "lam", lam, at_least=0, at_most=1)
        self.value_lam = number_or_none(self, "value_lam", value_lam, at_least=0, at_most=1)

    def __call__(self, experience: Any) -> tuple[Tensor, Tensor]:
        """Advantages and returns.

        Raises:
            ValueError: The experience has no values (there is no critic).
        """
        if experience.values is None:
            raise ValueError("GAE: the experience has no values; give the module a critic")
        rewards, values, mask = experience.rewards, experience.values, experience.response_mask
        advantages, returns = gae(rewards, values, mask, self.gamma, self.lam)
        if self.value_lam is not None:
            returns = gae(rewards, values, mask, self.gamma, self.value_lam)[1]
        return advantages, returns

    def __repr__(self) -> str:
        value_lam = "" if self.value_lam is None else f", value_lam={self.value_lam}"
        return f"GAE(gamma={self.gamma}, lam={self.lam}{value_lam})"


class GroupRelative(AdvantageEstimator):
    """GRPO: (score - mean of the prompt's scores) / their standard deviation; no critic.

    Use it where the responses to a prompt get different scores, as with checkable answers. A prompt whose responses
    all have the same score teaches nothing. Token rewards are not read, so ``kl_coef`` must be 0; put the KL to the
    reference into the loss with ``KLLoss``.

    Args:
        scale: Divide by the (unbiased) standard deviation. False: prompts whose scores hardly differ do not get a
            larger weight. Dr. GRPO is False and ``LitPPO(loss_reduction=<max_new_tokens>)``.

    Reads ``experience.scores``, ``group`` and ``response_mask``.
    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1; Liu et al. 2025, arXiv:2503.20783 (``scale=False``).
    """

    needs_values = False
    needs_groups = True
    needs_rewards = False

    @constructor
    def __init__(self, scale: bool = True) -> None:
        self.scale = boolean(self, "scale", scale)

    def __call__(self, experience: Any) -> tuple[Tensor, None]:
        mask = experience.response_mask
        return group_relative_advantages(experience.scores, experience.group, mask, self.scale), None

    def __repr__(self) -> str:
        return f"GroupRelative(scale={self.scale})"


class LeaveOneOut(AdvantageEstimator):
    """RLOO: a response's summed rewards minus the mean over the prompt's other responses; no critic.

    Use it with two or more responses per prompt. The baseline is unbiased, and the KL stays in the reward.

    Reads ``experience.rewards``, ``group`` and ``response_mask``.
    Source: Ahmadian et al. 2024, arXiv:2402.14740.
    """

    needs_values = False
    needs_groups = True

    @constructor
    def __init__(self) -> None: ...

    def __call__(self, experience: Any) -> tuple[Tensor, None]:
        return leave_one_out_advantages(experience.rewards, experience.group, experience.response_mask), None

    def __repr__(self) -> str:
        return "LeaveOneOut()"


class Reinforce(AdvantageEstimator):
    """REINFORCE++: the sum of rewards from each token on, whitened over the update's response tokens; no critic.

    Use it with one response per prompt and large batches: the batch is the only baseline. With several responses per
    prompt, use ``group_baseline``.

    Args:
        group_baseline: Subtract the mean return of the prompt's responses first (REINFORCE++-baseline). Unlike
            ``GroupRelative`` it divides by one deviation for the batch, so hard and easy prompts keep their weights.

    Reads ``experience.rewards``, ``response_mask`` and, with ``group_baseline``, ``group``.
    Source: Hu et al. 2025, arXiv:2501.03262.
    """

    needs_values = False

    @constructor
    def __init__(self, group_baseline: bool = False) -> None:
        self.group_baseline = self.needs_groups = boolean(self, "group_baseline", group_baseline)

    def __call__(self, experience: Any) -> tuple[Tensor, None]:
        group = experience.group if self.group_baseline else None
        return reinforce_advantages(experience.rewards, experience.response_mask, group), None

    def __repr__(self) -> str:
        return f"Reinforce(group_baseline={self.group_baseline})"
