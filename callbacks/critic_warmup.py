"""Train the critic before the actor."""

from typing import Any

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import metric, refuse_beside, refuse_none, require
from lit_ppo.callbacks.fields import present
from lit_ppo.constructor import constructor
from lit_ppo.functional import explained_variance as explained_variance_of
from lit_ppo.validate import fraction_or_none, integer, positive_or_none, refuse


class CriticWarmup(PPOCallback):
    """Freezes the actor at first while the critic trains on its responses, for some updates or until it is good.

    Use it when the critic starts from a model that never predicted returns: its first advantages are noise and would
    push the actor away from its start. A frozen update costs less than a normal one, since the actor's forward and
    backward are skipped; the actor's schedule does not advance. Needs a critic.

    The warm-up ends after the first update that reaches any of the given levels; at least one of the first three
    arguments is required. A level that is never reached keeps the actor frozen, so give ``updates`` as well.

    Args:
        updates: Number of warm-up updates.
        value_loss: Value loss at or below which the warm-up ends, averaged over an update's optimizer steps and in
            the units of ``value/loss``.
        explained_variance: ``value/explained_variance`` at or above which the warm-up ends; it is that of the values
            at rollout, before the optimizer steps. Above 0 and below 1.
        ppo_epochs: Passes over the experience during the warm-up, which can be more than the module's; None keeps
            the module's.

    Reads ``metrics["value_loss"]``, ``experience.values``, ``experience.returns``. Writes ``pl_module.actor_frozen``
    before each update until the warm-up is over, and never afterwards; sets ``pl_module.ppo_epochs`` for each update
    of the warm-up and restores it afterwards. A fit that ends during the warm-up leaves the actor unfrozen.
    Source: Zheng et al. 2023, arXiv:2307.04964, section 5.3 (the critic is trained before the policy).
    """

    reads = ("values", "returns", "response_mask")

    @constructor
    def __init__(
        self,
        updates: int | None = None,
        value_loss: float | None = None,
        explained_variance: float | None = None,
        ppo_epochs: int | None = None,
    ) -> None:
        if updates is None and value_loss is None and explained_variance is None:
            refuse(self, "updates", None, "give updates, value_loss or explained_variance to end the warm-up")
        self.updates = None if updates is None else integer(self, "updates", updates)
        self.value_loss = positive_or_none(self, "value_loss", value_loss)
        self.explained_variance = fraction_or_none(self, "explained_variance", explained_variance)
        self.ppo_epochs = None if ppo_epochs is None else integer(self, "ppo_epochs", ppo_epochs)
        self._done = 0
        self._length: int | None = None  # updates of the finished warm-up; None before its end
        self._value_losses: list[float] = []  # per optimizer step of this update
        self._own_ppo_epochs: int | None = None  # the module's value, while it is replaced

    def waits_for(self, pl_module: Any) -> set[str]:
        hooks = {"on_update_end"} | ({"on_minibatch_end"} if self.value_loss is not None else set())
        freezes_late = self.ppo_epochs is not None and "on_rollout_start" not in pl_module._fired.ever
        return hooks | ({"on_rewards"} if freezes_late else set())

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require(self, pl_module, "actor_frozen", *(["ppo_epochs"] if self.ppo_epochs is not None else []))
        refuse_beside(self, trainer, CriticWarmup, why="both would set actor_frozen")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        refuse_none(self, pl_module, "critic")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Freeze the actor early, since callbacks earlier in the list may read ``actor_frozen``."""
        self._set_frozen(pl_module)

    def on_rollout_start(self, trainer: L.Trainer, pl_module: PPOModule, prompts: Any) -> None:
        self._freeze(pl_module)

    def on_rewards(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Again for custom loops that make several updates from one rollout."""
        self._freeze(pl_module)

    def on_minibatch_end(
        self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike, metrics: dict[str, float]
    ) -> None:
        if self._length is None and self.value_loss is not None:
            self._value_losses.append(metric(self, pl_module, metrics, "value_loss") or 0.0)

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        self._done += 1
        if self._length is None and self._is_over(experience):
            self._length = self._done
        self._value_losses = []
        self._restore_epochs(pl_module)
        self._set_frozen(pl_module)  # already here, since callbacks earlier in the list may read it

    def restore(self, pl_module: Any) -> None:
        self._value_losses = []
        self._restore_epochs(pl_module)
        if self._length is None and hasattr(pl_module, "actor_frozen"):
            pl_module.actor_frozen = False

    def _restore_epochs(self, pl_module: Any) -> None:
        if self._own_ppo_epochs is not None:
            pl_module.ppo_epochs, self._own_ppo_epochs = self._own_ppo_epochs, None

    def _set_frozen(self, pl_module: PPOModule) -> None:
        if self._length is None or self._done == self._length:  # later, another callback may set it
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
        values, returns = present(experience, "values"), present(experience, "returns")
        explained = explained_variance_of(values, returns, experience.response_mask)
        return bool(explained >= self.explained_variance)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done, "length": self._length}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done, self._length = state_dict["done"], state_dict["length"]
