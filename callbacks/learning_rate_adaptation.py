"""Control the size of policy updates by the learning rate."""

from typing import Any

import lightning as L
import torch

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import metric, refuse_beside, require
from lit_ppo.constructor import constructor
from lit_ppo.functional import adaptive_learning_rate
from lit_ppo.validate import number, positive, refuse


class LearningRateAdaptation(PPOCallback):
    """Lowers the actor's learning rate after an update with a large KL, and raises it after one with a small KL.

    Use it when no single learning rate suits the full run, or none is known: it finds the largest one with which the
    KL of updates stays near ``target``. It pauses while the actor is frozen, and needs updates of several optimizer
    steps, since before the first step the KL is 0. Costs nothing. It replaces a learning rate schedule.

    Args:
        target: Approximate KL to the policy that sampled, nats per token, averaged over the optimizer steps of an
            update. More than twice of it is large, less than half of it is small.
        factor: The rate is divided or multiplied by this; above 1.
        minimum: Lowest rate.
        maximum: Highest rate.

    Reads ``metrics["approx_kl"]``; writes ``pl_module.actor_optimizer``, its learning rate, which is saved with the
    optimizer and logged by the module as ``policy/lr``.
    Source: Rudin et al. 2021, arXiv:2109.11978, its code (``rsl_rl``); after the penalty of Schulman et al. 2017,
    arXiv:1707.06347, section 4.
    """

    @constructor
    def __init__(self, target: float, factor: float = 1.5, minimum: float = 1e-7, maximum: float = 1e-4) -> None:
        self.target = positive(self, "target", target)
        self.factor = number(self, "factor", factor, above=1)
        self.maximum = positive(self, "maximum", maximum)
        self.minimum = positive(self, "minimum", minimum)
        if self.minimum >= self.maximum:
            refuse(self, "minimum", minimum, f"must be below maximum={maximum:g}; lower it, or raise maximum")
        self._kls: list[float] = []  # per optimizer step of this update

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, LearningRateAdaptation, why="both would set the actor's learning rate")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
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
                    f"rate in {name} is {float(group['lr'])}; start between them, or change them"
                )

    def restore(self, pl_module: Any) -> None:
        self._kls = []

    def on_minibatch_end(
        self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike, metrics: dict[str, float]
    ) -> None:
        kl = metric(self, pl_module, metrics, "approx_kl")
        self._kls += [] if kl is None else [kl]

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        if not self._kls:
            return
        kl, self._kls = sum(self._kls) / len(self._kls), []
        for group in pl_module.actor_optimizer.param_groups:
            bounds = self.minimum, self.maximum
            rate = adaptive_learning_rate(float(group["lr"]), kl, self.target, self.factor, *bounds)
            if isinstance(group["lr"], torch.Tensor):  # torchao's optimizers insist on it
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def _plain(optimizer: Any) -> Any:
    """The optimizer without Lightning's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
