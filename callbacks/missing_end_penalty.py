"""Penalise responses without an end."""

from typing import Any

import lightning as L
import torch

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside
from lit_ppo.constructor import constructor
from lit_ppo.validate import exactly_one, number, positive_or_none


class MissingEndPenalty(PPOCallback):
    """Lowers or replaces the score of a response without a stop token; ``raw_scores`` do not change.

    Use it when responses reach the length limit, or when the score of half a response is meaningless: most reward
    models were trained on complete ones. ``score`` sets a fixed value, below the scores of complete responses;
    ``penalty`` keeps the information in the score. Give exactly one of them, in the unit of the scores after earlier
    callbacks in the list. Costs nothing.

    Args:
        penalty: Subtracted from the score.
        score: Replaces the score.

    Reads ``experience.ended``; reads and writes ``experience.scores``. The module logs ``response/ended_fraction``.
    Source: Huang et al. 2024, arXiv:2403.17031, the "EOS trick" (a score of -1); TRL's ``missing_eos_penalty``.
    """

    reads = ("ended", "scores")

    @constructor
    def __init__(self, penalty: float | None = None, score: float | None = None) -> None:
        exactly_one(self, penalty=penalty, score=score)
        self.penalty = positive_or_none(self, "penalty", penalty)
        self.score = None if score is None else number(self, "score", score)

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, MissingEndPenalty, why="both would change the same scores")

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        scores = experience.scores
        lowered = scores.new_tensor(self.score) if self.penalty is None else scores - self.penalty
        experience.scores = torch.where(experience.ended, scores, lowered)
