"""Hold the KL to the reference near a target by adapting its coefficient."""

from typing import Any

import lightning as L

from lit_ppo.callbacks.base import (
    ExperienceLike,
    PPOCallback,
    PPOModule,
    positive,
    refuse_beside,
    require,
    require_model,
)
from lit_ppo.functional import adaptive_kl_coef


class AdaptiveKL(PPOCallback):
    """Adapts ``kl_coef`` after every update so that the KL to the reference stays near ``target``.

    Use it when one fixed ``kl_coef`` lets the policy drift late in training or pins it early. It rests while the
    actor is frozen: nothing it could do would move the KL then. Costs nothing. Needs a reference and a ``kl_coef``
    over 0 to start from.

    Args:
        target: KL to hold, nats per response. 6 suits responses of about 24 tokens.
        horizon: Episodes over which the coefficient can change by its own size; larger is slower.

    Reads ``experience.kl``, the estimate that is penalised; writes ``pl_module.kl_coef``, which the module logs as
    ``objective/kl_coef``.
    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, target: float = 6.0, horizon: int = 10_000) -> None:
        self.target = positive(self, "target", target)
        self.horizon = positive(self, "horizon", horizon)
        self._kl_coef: float | None = None  # None until an update or a checkpoint sets it
        self._rests = False

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module without a coefficient, and a second controller."""
        require(self, pl_module, "kl_coef")
        refuse_beside(self, trainer, AdaptiveKL, why="both would set kl_coef")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse what leaves nothing to control."""
        require_model(self, pl_module, "reference")
        if not pl_module.kl_coef > 0:
            raise ValueError(
                f"AdaptiveKL multiplies kl_coef, and {type(pl_module).__name__}(kl_coef={pl_module.kl_coef!r}) "
                "would stay as it is; start from a value over 0, such as 0.05"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Go on with the adapted coefficient after a resume."""
        if self._kl_coef is not None:
            pl_module.kl_coef = self._kl_coef

    def on_rewards(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """See whether the actor moves in this update."""
        self._rests = getattr(pl_module, "actor_frozen", False)

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Set the next update's coefficient."""
        if self._rests:
            return
        kl = experience.kl.sum(dim=1).mean().item()  # nats per response; 0 where masked
        self._kl_coef = pl_module.kl_coef = adaptive_kl_coef(
            pl_module.kl_coef, kl, self.target, self.horizon, n_steps=len(experience.kl)
        )

    def state_dict(self) -> dict[str, Any]:
        """The coefficient in force."""
        return {"kl_coef": self._kl_coef}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self._kl_coef = state_dict["kl_coef"]
