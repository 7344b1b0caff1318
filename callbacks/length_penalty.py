"""Penalise responses over a token budget."""

from typing import Any

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside
from lit_ppo.constructor import constructor
from lit_ppo.functional import length_penalty
from lit_ppo.validate import integer, positive, positive_or_none


class LengthPenalty(PPOCallback):
    """Subtracts ``coef`` from the score for each response token over ``budget``; ``raw_scores`` do not change.

    Use it when responses grow longer without getting better, as reward models tend to prefer long ones. Unlike a hard
    limit it tells the policy how far it is from the budget. DAPO's soft overlong punishment, with maximum length
    ``L_max`` and interval ``L_cache``, is ``budget=L_max - L_cache, coef=1 / L_cache, max_penalty=1``. The unit is that
    of the scores after earlier callbacks in the list. Costs nothing.

    Args:
        budget: Number of tokens without a penalty, including the stop token.
        coef: Penalty for each further token.
        max_penalty: Maximum penalty of a response; None for no bound.

    Reads ``experience.response_mask``; reads and writes ``experience.scores``. Logs ``reward/length_penalty``: the
    mean penalty.
    Source: Yu et al. 2025, arXiv:2503.14476, section 3.4, equation 13.
    """

    reads = ("response_mask", "scores")

    @constructor
    def __init__(self, budget: int, coef: float, max_penalty: float | None = None) -> None:
        self.budget = integer(self, "budget", budget, at_least=0)
        self.coef = positive(self, "coef", coef)
        self.max_penalty = positive_or_none(self, "max_penalty", max_penalty)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, LengthPenalty, why="both would penalise the same tokens")

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        penalty = length_penalty(experience.response_mask, self.budget, self.coef, self.max_penalty)
        experience.scores = experience.scores - penalty
        pl_module.log("reward/length_penalty", float(penalty.mean()))
