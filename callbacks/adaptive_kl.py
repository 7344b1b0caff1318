"""Hold the KL to the reference near a target by adapting its coefficient."""

from typing import Any, Literal

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require, require_model
from lit_ppo.functional import adaptive_kl_coef, linear_schedule, masked_mean
from lit_ppo.validate import integer, one_of, positive, positive_or_none


class AdaptiveKL(PPOCallback):
    """Adapts ``kl_coef`` after every update so that the KL to the reference stays near ``target``.

    Use it when one fixed ``kl_coef`` lets the policy drift late in training or pins it early. It rests while the
    actor is frozen: nothing it could do would move the KL then. Costs nothing. Needs a reference and a ``kl_coef``
    over 0 to start from.

    Args:
        target: KL to hold, nats per response (or per token). 6 suits responses of about 24 tokens.
        horizon: Episodes over which the coefficient can change by its own size; larger is slower.
        per: What ``target`` is measured over: ``"response"``, the sum over its tokens, or ``"token"``, the mean over
            all response tokens, which leaves alone what responses gain by their length.
        final_target: Target at the end of a straight line from ``target``, such as a lower one that draws the policy
            back; None keeps ``target``.
        decay_updates: Updates that the line takes, those not counted in which the actor is frozen.

    Reads ``experience.kl``, the estimate that is penalised; writes ``pl_module.kl_coef``, which the module logs as
    ``objective/kl_coef``. Logs ``objective/kl_target``, the target in force, where it moves.
    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(
        self,
        target: float = 6.0,
        horizon: int = 10_000,
        per: Literal["response", "token"] = "response",
        final_target: float | None = None,
        decay_updates: int | None = None,
    ) -> None:
        self.target = positive(self, "target", target)
        self.horizon = positive(self, "horizon", horizon)
        self.per = one_of(self, "per", per, ("response", "token"))
        self.final_target = positive_or_none(self, "final_target", final_target)
        self.decay_updates = None if decay_updates is None else integer(self, "decay_updates", decay_updates)
        if (final_target is None) != (decay_updates is None):
            raise ValueError(
                f"AdaptiveKL(final_target={final_target!r}, decay_updates={decay_updates!r}): give both or neither"
            )
        self._done = 0
        self._kl_coef: float | None = None  # None until an update or a checkpoint sets it
        self._start: float | None = None  # the module's own, which this one started from
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
        """Go on with the adapted coefficient after a resume, or start from the module's if that was changed."""
        if self._kl_coef is not None and self._start in (None, pl_module.kl_coef):
            pl_module.kl_coef = self._kl_coef
        else:
            self._start, self._kl_coef = pl_module.kl_coef, None

    def on_rewards(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """See whether the actor moves in this update."""
        self._rests = getattr(pl_module, "actor_frozen", False)

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Set the next update's coefficient."""
        target = self._target()
        if self.final_target is not None:
            pl_module.log("objective/kl_target", target)
        if self._rests:
            return
        if self.per == "token":
            kl = masked_mean(experience.kl, experience.response_mask).item()
        else:
            kl = experience.kl.sum(dim=1).mean().item()  # 0 where masked
        self._kl_coef = pl_module.kl_coef = adaptive_kl_coef(
            pl_module.kl_coef, kl, target, self.horizon, n_steps=len(experience.kl)
        )
        self._done += 1

    def _target(self) -> float:
        if self.final_target is None or self.decay_updates is None:
            return self.target
        return linear_schedule(self.target, self.final_target, self._done, self.decay_updates)

    def state_dict(self) -> dict[str, Any]:
        """The coefficient in force, where it started, and the updates done."""
        return {"kl_coef": self._kl_coef, "start": self._start, "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up again."""
        self._kl_coef, self._start, self._done = (state_dict[name] for name in ("kl_coef", "start", "done"))
