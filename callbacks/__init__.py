"""The tricks, one callback a file, imported as ``lit_ppo.callbacks``."""

if __name__ == "callbacks":
    raise ImportError("import lit_ppo.callbacks instead of callbacks: under two names every class would exist twice")

from lit_ppo.callbacks.adaptive_kl import AdaptiveKL
from lit_ppo.callbacks.advantage_normalization import AdvantageNormalization
from lit_ppo.callbacks.base import PPOCallback, fire
from lit_ppo.callbacks.critic_warmup import CriticWarmup
from lit_ppo.callbacks.entropy_bonus import EntropyBonus
from lit_ppo.callbacks.reward_normalization import RewardNormalization
from lit_ppo.callbacks.value_clipping import ValueClipping

__all__ = [
    "AdaptiveKL",
    "AdvantageNormalization",
    "CriticWarmup",
    "EntropyBonus",
    "PPOCallback",
    "RewardNormalization",
    "ValueClipping",
    "fire",
]
