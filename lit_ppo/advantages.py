"""Advantage estimators: what turns token rewards into the numbers that weight the policy's loss."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from lit_ppo.functional import gae


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


def _fraction(owner: object, name: str, value: float) -> float:
    """``value`` if it lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{type(owner).__name__}({name}={value!r}): must lie in [0, 1]; 1 is no discount")
    return value
