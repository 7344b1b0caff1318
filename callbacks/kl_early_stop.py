"""End an update when the policy has moved far enough."""

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import metric, refuse_beside
from lit_ppo.constructor import constructor
from lit_ppo.validate import positive


class KLEarlyStop(PPOCallback):
    """Ends an update before the optimizer step at which the KL to the policy that sampled exceeds ``target``.

    Use it with a high ``ppo_epochs``: each update then takes as many steps as its samples allow, and one with a policy
    that runs away ends early. The step at which the KL is too large is skipped for actor and critic; its forward and
    backward are the only cost. It does nothing while the actor is frozen.

    Args:
        target: KL at which to stop, nats per token. It is not multiplied: for a recipe that stops at 1.5 times a
            target KL of 0.01, use 0.015.

    Reads ``metrics["approx_kl"]``; writes ``experience.exhausted``. Logs ``policy/early_stop``: 1 for an update that
    ended early, else 0.
    Source: OpenAI Spinning Up 2018, PPO.
    """

    @constructor
    def __init__(self, target: float) -> None:
        self.target = positive(self, "target", target)
        self._stopped = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        refuse_beside(self, trainer, KLEarlyStop, why="only the lower target would have an effect")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stopped = False  # after a run that an error has ended

    def on_minibatch_end(
        self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike, metrics: dict[str, float]
    ) -> None:
        kl = metric(self, pl_module, metrics, "approx_kl")
        if kl is not None and kl > self.target:
            self._stopped = experience.exhausted = True

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        pl_module.log("policy/early_stop", float(self._stopped))
        self._stopped = False
