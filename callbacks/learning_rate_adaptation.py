"""Keep the policy's pace by the learning rate."""

from typing import Any

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require
from lit_ppo.functional import adaptive_learning_rate
from lit_ppo.validate import positive


class LearningRateAdaptation(PPOCallback):
    """Lowers the actor's learning rate after an update that moved the policy far, and raises it after a timid one.

    Use it when no one learning rate suits the whole run, or none is known: it finds the largest with which updates
    stay near ``target``. It rests while the actor is frozen, and needs updates of several optimizer steps: before the
    first there is no KL to see. Costs nothing. In place of a schedule, not beside one.

    Args:
        target: Mean approximate KL over an update's optimizer steps, from the policy that sampled, nats per token.
            Over twice of it is far, under half of it is timid.
        factor: By which the rate is divided or multiplied.
        minimum: Lowest rate.
        maximum: Highest rate.

    Reads ``metrics["approx_kl"]``; writes ``pl_module.actor_optimizer``'s learning rate, which is saved with it
    and logged by the module as ``policy/lr``.
    Source: Rudin et al. 2021, arXiv:2109.11978, its code (``rsl_rl``); after the penalty of Schulman et al. 2017,
    arXiv:1707.06347, section 4.
    """

    def __init__(self, target: float, factor: float = 1.5, minimum: float = 1e-7, maximum: float = 1e-4) -> None:
        self.target = positive(self, "target", target)
        self.factor = positive(self, "factor", factor)
        if factor <= 1:
            raise ValueError(f"LearningRateAdaptation(factor={factor!r}): must be over 1, such as 1.5")
        self.minimum = positive(self, "minimum", minimum)
        self.maximum = positive(self, "maximum", maximum)
        if minimum >= maximum:
            raise ValueError(
                f"LearningRateAdaptation(minimum={minimum!r}, maximum={maximum!r}): minimum must be under maximum"
            )
        self._kls: list[float] = []  # of this update's optimizer steps

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a second controller."""
        refuse_beside(self, trainer, LearningRateAdaptation, why="both would set the actor's learning rate")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse a module without the actor's optimizer, a schedule on it, and a rate out of bounds."""
        require(self, pl_module, "actor_optimizer")
        name, optimizer = type(pl_module).__name__, _plain(pl_module.actor_optimizer)
        for config in trainer.lr_scheduler_configs:
            if _plain(config.scheduler.optimizer) is optimizer:
                raise ValueError(
                    f"LearningRateAdaptation and {name}(actor_scheduler={type(config.scheduler).__name__}): both would "
                    "set the actor's learning rate; keep one of them"
                )
        for group in optimizer.param_groups:
            if not self.minimum <= group["lr"] <= self.maximum:
                raise ValueError(
                    f"LearningRateAdaptation(minimum={self.minimum!r}, maximum={self.maximum!r}): the actor's learning "
                    f"rate in {name} is {group['lr']}; start between them, or move them"
                )

    def on_minibatch_end(
        self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike, metrics: dict[str, float]
    ) -> None:
        """Note the KL before a step; steps in which the actor rests have none."""
        if "approx_kl" in metrics:
            self._kls.append(metrics["approx_kl"])

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Set the next update's rate."""
        if not self._kls:
            return
        kl, self._kls = sum(self._kls) / len(self._kls), []
        for group in pl_module.actor_optimizer.param_groups:
            group["lr"] = adaptive_learning_rate(group["lr"], kl, self.target, self.factor, self.minimum, self.maximum)


def _plain(optimizer: Any) -> Any:
    """The optimizer without Lightning's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
