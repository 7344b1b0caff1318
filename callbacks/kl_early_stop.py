"""End an update whose policy has moved far enough."""

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside
from lit_ppo.validate import positive


class KLEarlyStop(PPOCallback):
    """Ends an update before the optimizer step at which the KL to the policy that sampled is over ``target``.

    Use it where ``ppo_epochs`` is high: most updates then take the steps that their samples are good for, and one
    whose policy runs away is cut short. The step that finds the KL too large is not taken, neither the actor's nor the
    critic's; its forwards and backwards are what it costs. It never acts while the actor is frozen.

    Args:
        target: KL at which to stop, nats per token: the level itself. Where a recipe stops at 1.5 times its target
            KL of 0.01, this is 0.015.

    Reads ``metrics["approx_kl"]``; writes ``experience.exhausted``. Logs ``policy/early_stop``: 1 for an update that
    was ended, else 0.
    Source: OpenAI Spinning Up 2018, PPO.
    """

    def __init__(self, target: float) -> None:
        self.target = positive(self, "target", target)
        self._stopped = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a second one."""
        refuse_beside(self, trainer, KLEarlyStop, why="the lower target alone would act")

    def on_rewards(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """A new update."""
        self._stopped = False

    def on_minibatch_end(
        self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike, metrics: dict[str, float]
    ) -> None:
        """End the update; steps in which the actor rested have no KL."""
        if metrics.get("approx_kl", 0.0) > self.target:
            self._stopped = experience.exhausted = True

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Log whether it was ended."""
        pl_module.log("policy/early_stop", float(self._stopped))
