"""The tricks, one callback a file, imported as ``lit_ppo.callbacks``."""

from lit_ppo.callbacks.base import PPOCallback, fire

__all__ = ["PPOCallback", "fire"]
