"""What the callbacks that learn from other tokens share: their checks, and what they take from a rollout."""

from typing import Any

import lightning as L
from torch import Tensor

from lit_ppo.callbacks.base import ExperienceLike
from lit_ppo.callbacks.fields import extra, present
from lit_ppo.callbacks.least_squares_critic import LeastSquaresCritic
from lit_ppo.validate import refuse


def refuse_tolerance(callback: L.Callback, pl_module: Any) -> None:
    """Refuse a module that may keep the log-probs of sampling: only the training pass samples other tokens.

    Raises:
        ValueError: Its ``sampling_logprobs_tolerance`` is set.
    """
    if (tolerance := getattr(pl_module, "tolerance", None)) is not None:
        problem = f"{type(callback).__name__} needs the training pass in any case; leave it out"
        refuse(pl_module, "sampling_logprobs_tolerance", tolerance, problem)


def solver_of(trainer: L.Trainer) -> LeastSquaresCritic | None:
    """The callback that solves for values, if there is one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, LeastSquaresCritic)), None)


def values_after(callback: L.Callback, solver: LeastSquaresCritic | None, experience: ExperienceLike) -> Tensor:
    """Values behind other tokens: the solver's, or else the critic's own. Frees their states, which are large.

    Shapes:
        -> (B, T, n).
    """
    extras, after = experience.extras, extra(callback, experience, "action_values")
    states = extras.get("action_states")
    if solver is not None and states is not None:
        after = solver.values_after(after, states)
    extras |= {"action_values": after, "action_states": None}  # for a second update
    return after  # type: ignore[no-any-return]


def plain_advantages(pl_module: Any, experience: ExperienceLike) -> Tensor:
    """The estimator's advantages, before callbacks have changed them.

    Shapes:
        -> (B, T).
    """
    estimator: Any = getattr(pl_module, "advantages", None)
    if estimator is None:
        return present(experience, "returns") - present(experience, "values")
    advantages: Tensor = estimator(experience)[0]
    return advantages
