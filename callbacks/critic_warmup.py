"""Let the critic learn before the actor follows it."""

from typing import Any

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require, require_model
from lit_ppo.functional import explained_variance as explained_variance_of
from lit_ppo.validate import integer, positive_or_none


class CriticWarmup(PPOCallback):
    """Freezes the actor at first, while the critic trains on its responses: for so many updates, or until it is good.

    Use it when the critic starts from a model that never predicted returns: its first advantages are noise, which
    would push the actor away from its start. A frozen update costs less than a whole one, as the actor's forward
    and backward are skipped; its schedule waits. Needs a critic.

    The warm-up ends after the first update that reaches any of the levels given; at least one of the first three
    arguments is needed. A level that is never reached keeps the actor frozen, so give ``updates`` beside it.

    Args:
        updates: Updates in which only the critic learns.
        value_loss: Value loss, averaged over an update's optimizer steps as ``value/loss`` is and in its units, at or
            below which the critic is good.
        explained_variance: ``value/explained_variance``, which is of the values at rollout, before the update's
            steps, at or above which the critic is good; over 0 and under 1.
        ppo_epochs: Passes over the experience meanwhile, which may be more than the module's own; None leaves those.

    Reads ``metrics["value_loss"]``, ``experience.values``, ``experience.returns``. Writes ``pl_module.actor_frozen``,
    before each update until the warm-up is over, and leaves it alone afterwards; ``pl_module.ppo_epochs`` is set for
    each update of the warm-up, and put back after it.
    Source: Zheng et al. 2023, arXiv:2307.04964, section 5.3 (the critic is trained before the policy).
    """

    def __init__(
        self,
        updates: int | None = None,
        value_loss: float | None = None,
        explained_variance: float | None = None,
        ppo_epochs: int | None = None,
    ) -> None:
        if updates is None and value_loss is None and explained_variance is None:
            raise ValueError(
                "CriticWarmup(updates=None): must be a whole number of updates, at least 1, unless value_loss or "
                "explained_variance says when the warm-up ends"
            )
        self.updates = None if updates is None else integer(self, "updates", updates)
        self.value_loss = positive_or_none(self, "value_loss", value_loss)
        self.explained_variance = positive_or_none(self, "explained_variance", explained_variance)
        if explained_variance is not None and not explained_variance < 1:
            raise ValueError(
                f"CriticWarmup(explained_variance={explained_variance!r}): must be under 1, which no critic reaches"
            )
        self.ppo_epochs = None if ppo_epochs is None else integer(self, "ppo_epochs", ppo_epochs)
        self._done = 0
        self._length: int | None = None  # updates that the warm-up took; None while it is on
        self._value_losses: list[float] = []  # of this update's steps
        self._own_ppo_epochs: int | None = None  # the module's, while ours are in their place

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module whose actor cannot be frozen, and a second warm-up."""
        require(self, pl_module, "actor_frozen", *(["ppo_epochs"] if self.ppo_epochs is not None else []))
        refuse_beside(self, trainer, CriticWarmup, why="both would set actor_frozen")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse a module without a critic."""
        require_model(self, pl_module, "critic")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Freeze the actor before a callback ahead in the list looks, at the start and after a resume."""
        self._set_frozen(pl_module)

    def on_rollout_start(self, trainer: L.Trainer, pl_module: PPOModule, prompts: Any) -> None:
        """Freeze the actor, or let it go."""
        self._freeze(pl_module)

    def on_rewards(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """The same where a loop makes several updates out of one rollout."""
        self._freeze(pl_module)

    def on_minibatch_end(
        self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike, metrics: dict[str, float]
    ) -> None:
        """Note how good the critic is."""
        if self._length is None and "value_loss" in metrics:
            self._value_losses.append(metrics["value_loss"])

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Count the update, and see whether it was the last of the warm-up."""
        self._done += 1
        if self._length is None and self._is_over(experience):
            self._length = self._done
        self._value_losses = []
        if self._own_ppo_epochs is not None:
            pl_module.ppo_epochs, self._own_ppo_epochs = self._own_ppo_epochs, None
        self._set_frozen(pl_module)  # the next update's: callbacks ahead in the list look before we are asked again

    def _set_frozen(self, pl_module: PPOModule) -> None:
        if self._length is None or self._done == self._length:  # afterwards it may be another callback's
            pl_module.actor_frozen = self._length is None

    def _freeze(self, pl_module: PPOModule) -> None:
        self._set_frozen(pl_module)
        if self._length is None and self.ppo_epochs is not None and self._own_ppo_epochs is None:
            self._own_ppo_epochs, pl_module.ppo_epochs = pl_module.ppo_epochs, self.ppo_epochs

    def _is_over(self, experience: ExperienceLike) -> bool:
        if self.updates is not None and self._done >= self.updates:
            return True
        n_steps = len(self._value_losses)
        if self.value_loss is not None and n_steps and sum(self._value_losses) / n_steps <= self.value_loss:
            return True
        if self.explained_variance is None:
            return False
        assert experience.values is not None  # there is a critic
        assert experience.returns is not None
        explained = explained_variance_of(experience.values, experience.returns, experience.response_mask)
        return bool(explained >= self.explained_variance)

    def state_dict(self) -> dict[str, Any]:
        """Updates done, and how many of them the warm-up took."""
        return {"done": self._done, "length": self._length}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count up again."""
        self._done, self._length = state_dict["done"], state_dict["length"]
