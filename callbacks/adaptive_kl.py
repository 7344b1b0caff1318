"""Keep the KL to the reference near a target by adapting its coefficient."""

from math import isfinite
from typing import Any, Literal

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, refuse_none, require
from lit_ppo.constructor import constructor
from lit_ppo.functional import adaptive_kl_coef, linear_schedule, masked_mean
from lit_ppo.validate import all_or_none, integer, one_of, positive, positive_or_none


class AdaptiveKL(PPOCallback):
    """Adapts ``kl_coef`` after every update to keep the KL to the reference near ``target``.

    Use it when a fixed ``kl_coef`` lets the policy drift late in training or holds it back early. It pauses while the
    actor is frozen, when the coefficient cannot change the KL. Costs nothing. Needs a KL to a reference and an initial
    ``kl_coef`` above 0.

    Args:
        target: Target KL, nats per response (or per token). 6 suits responses of about 24 tokens.
        horizon: Episodes in which the coefficient changes by at most about a fifth of its size; larger is slower.
        per: Unit of ``target``: per ``"response"``, the sum over its tokens, or per ``"token"``, the mean over all
            response tokens, which does not grow with the length of responses.
        final_target: Target at the end of a linear schedule from ``target``, for example a lower one that pulls the
            policy back; None keeps ``target``.
        decay_updates: Updates of that schedule, not counting those with a frozen actor.

    Reads ``experience.kl``, the estimate that is penalised; writes ``pl_module.kl_coef``, which the module logs as
    ``objective/kl_coef``. Logs ``objective/kl_target``, the current target, if it changes.
    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    reads = ("kl", "response_mask")

    @constructor
    def __init__(
        self,
        target: float = 6.0,
        horizon: int = 10_000,
        per: Literal["response", "token"] = "response",
        final_target: float | None = None,
        decay_updates: int | None = None,
    ) -> None:
        self.target = positive(self, "target", target)
        self.horizon = integer(self, "horizon", horizon)
        self.per = one_of(self, "per", per, ("response", "token"))
        self.final_target = positive_or_none(self, "final_target", final_target)
        self.decay_updates = None if decay_updates is None else integer(self, "decay_updates", decay_updates)
        all_or_none(self, final_target=final_target, decay_updates=decay_updates)
        self._done = 0
        self._kl_coef: float | None = None  # None until an update or a checkpoint sets it
        self._start: float | None = None  # the module's own value at the start
        self._rests = False

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require(self, pl_module, "kl_coef")
        refuse_beside(self, trainer, AdaptiveKL, why="both would set kl_coef")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        refuse_none(self, pl_module, "reference")
        if not pl_module.kl_coef > 0:
            raise ValueError(
                f"AdaptiveKL multiplies kl_coef, which has no effect on {type(pl_module).__name__}(kl_coef="
                f"{pl_module.kl_coef!r}); use an initial value above 0, such as 0.05"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Resume with the adapted coefficient, unless the module's own value has changed since."""
        if self._kl_coef is not None and self._start in (None, pl_module.kl_coef):
            pl_module.kl_coef = self._kl_coef
        else:
            self._start, self._kl_coef = pl_module.kl_coef, None

    def on_rewards(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        self._rests = getattr(pl_module, "actor_frozen", False)

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        target = self._target()
        if self.final_target is not None:
            pl_module.log("objective/kl_target", target)
        if self._rests:
            return
        if self.per == "token":
            kl = masked_mean(experience.kl, experience.response_mask).item()
        else:
            kl = experience.kl.sum(dim=1).mean().item()  # 0 where masked
        if not isfinite(kl):
            return  # the steps of this update were skipped, and no later coefficient would be finite
        self._kl_coef = pl_module.kl_coef = adaptive_kl_coef(
            pl_module.kl_coef, kl, target, self.horizon, n_steps=len(experience.kl)
        )
        self._done += 1

    def _target(self) -> float:
        if self.final_target is None or self.decay_updates is None:
            return self.target
        return linear_schedule(self.target, self.final_target, self._done, self.decay_updates)

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self._kl_coef, "start": self._start, "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kl_coef, self._start, self._done = (state_dict[name] for name in ("kl_coef", "start", "done"))
