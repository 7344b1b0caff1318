"""Advantage estimators: what turns token rewards into the numbers that weight the policy's loss."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from lit_ppo.functional import gae, group_relative_advantages, leave_one_out_advantages, reinforce_advantages


class AdvantageEstimator(ABC):
    """What ``LitPPO(advantages=...)`` takes; configurations call its subclasses by their short names.

    Class attributes say what it reads: ``needs_values`` that a critic has to provide ``experience.values``,
    ``needs_groups`` that it compares the responses to one prompt, of which there must be several, ``needs_rewards``
    that it reads token rewards, rather than scores alone.
    """

    needs_values: bool
    needs_groups = False
    needs_rewards = True

    @abstractmethod
    def __call__(self, experience: Any) -> tuple[Tensor, Tensor | None]:
        """Advantages, and the critic's targets where there is a critic; (B, T), 0 where masked."""


class GAE(AdvantageEstimator):
    """Generalised advantage estimation; the returns that the critic learns are advantages + values.

    Args:
        gamma: Discount per token. 1 (no discount) is the rule for language: the score comes with the last token.
        lam: 1 is Monte Carlo (no bias, high variance), 0 one-step (all trust in the critic).

    Reads ``experience.rewards``, ``values`` and ``response_mask``.
    Source: Schulman et al. 2015, arXiv:1506.02438.
    """

    needs_values = True

    def __init__(self, gamma: float = 1.0, lam: float = 0.95) -> None:
        self.gamma = _fraction(self, "gamma", gamma)
        self.lam = _fraction(self, "lam", lam)

    def __call__(self, experience: Any) -> tuple[Tensor, Tensor]:
        """Advantages and returns of the experience.

        Raises:
            ValueError: The experience has no values (there is no critic).
        """
        if experience.values is None:
            raise ValueError("GAE: the experience has no values; give the module a critic")
        return gae(experience.rewards, experience.values, experience.response_mask, self.gamma, self.lam)

    def __repr__(self) -> str:
        return f"GAE(gamma={self.gamma}, lam={self.lam})"


class GroupRelative(AdvantageEstimator):
    """GRPO: each score less the mean of its prompt's scores, over their standard deviation; no critic.

    Use it where several responses to a prompt can be told apart by their scores, as with checked answers. A prompt
    whose responses all score alike teaches nothing. The KL to the reference goes into the loss (``KLLoss``): token
    rewards are not read, so ``kl_coef`` has to be 0.

    Args:
        scale: Divide by the standard deviation (unbiased). False: prompts on which scores hardly differ weigh no
            more than others (Dr. GRPO).

    Reads ``experience.scores``, ``group`` and ``response_mask``.
    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1; Liu et al. 2025, arXiv:2503.20783 (``scale=False``).
    """

    needs_values = False
    needs_groups = True
    needs_rewards = False

    def __init__(self, scale: bool = True) -> None:
        if not isinstance(scale, bool):
            raise ValueError(f"GroupRelative(scale={scale!r}): must be true or false")
        self.scale = scale

    def __call__(self, experience: Any) -> tuple[Tensor, None]:
        """Advantages of the experience."""
        mask = experience.response_mask
        return group_relative_advantages(experience.scores, experience.group, mask, self.scale), None

    def __repr__(self) -> str:
        return f"GroupRelative(scale={self.scale})"


class LeaveOneOut(AdvantageEstimator):
    """RLOO: each response's summed rewards less the mean of those of the prompt's other responses; no critic.

    Use it with as few as two responses a prompt; the baseline is unbiased, and the KL stays in the reward.

    Reads ``experience.rewards``, ``group`` and ``response_mask``.
    Source: Ahmadian et al. 2024, arXiv:2402.14740.
    """

    needs_values = False
    needs_groups = True

    def __call__(self, experience: Any) -> tuple[Tensor, None]:
        """Advantages of the experience."""
        return leave_one_out_advantages(experience.rewards, experience.group, experience.response_mask), None

    def __repr__(self) -> str:
        return "LeaveOneOut()"


class Reinforce(AdvantageEstimator):
    """REINFORCE++: the rewards from each token on, whitened over all response tokens of the update; no critic.

    Use it with one response a prompt and large batches: the batch is the only baseline.

    Reads ``experience.rewards`` and ``response_mask``.
    Source: Hu et al. 2025, arXiv:2501.03262.
    """

    needs_values = False

    def __call__(self, experience: Any) -> tuple[Tensor, None]:
        """Advantages of the experience."""
        return reinforce_advantages(experience.rewards, experience.response_mask), None

    def __repr__(self) -> str:
        return "Reinforce()"


def _fraction(owner: object, name: str, value: float) -> float:
    """``value`` if it lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{type(owner).__name__}({name}={value!r}): must lie in [0, 1]; 1 is no discount")
    return value
