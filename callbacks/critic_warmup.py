"""Let the critic learn before the actor follows it."""

from typing import Any

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require, require_model


class CriticWarmup(PPOCallback):
    """Freezes the actor for the first ``updates`` updates, while the critic trains on its responses.

    Use it when the critic starts from a model that never predicted returns: its first advantages are noise, which
    would push the actor away from its start. A frozen update costs less than a whole one, as the actor's forward
    and backward are skipped; its schedule waits. Needs a critic.

    Args:
        updates: Updates in which only the critic learns.

    Writes ``pl_module.actor_frozen``, before each update until the warm-up is over, and leaves it alone afterwards.
    Source: Zheng et al. 2023, arXiv:2307.04964, section 5.3 (the critic is trained before the policy).
    """

    def __init__(self, updates: int) -> None:
        if not isinstance(updates, int) or updates < 1:
            raise ValueError(f"CriticWarmup(updates={updates!r}): must be a whole number of updates, at least 1")
        self.updates = updates
        self._done = 0

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module whose actor cannot be frozen, and a second warm-up."""
        require(self, pl_module, "actor_frozen")
        refuse_beside(self, trainer, CriticWarmup, why="both would set actor_frozen")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse a module without a critic."""
        require_model(self, pl_module, "critic")

    def on_rollout_start(self, trainer: L.Trainer, pl_module: PPOModule, prompts: Any) -> None:
        """Freeze the actor, or let it go."""
        self._freeze(pl_module)

    def on_rewards(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """The same where a loop makes several updates out of one rollout."""
        self._freeze(pl_module)

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Count the update."""
        self._done += 1

    def _freeze(self, pl_module: PPOModule) -> None:
        if self._done <= self.updates:  # afterwards it may be another callback's
            pl_module.actor_frozen = self._done < self.updates

    def state_dict(self) -> dict[str, Any]:
        """Updates done."""
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count up again."""
        self._done = state_dict["done"]
