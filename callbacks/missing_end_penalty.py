"""Make responses come to an end."""

from typing import Any

import lightning as L
import torch

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside
from lit_ppo.validate import positive_or_none


class MissingEndPenalty(PPOCallback):
    """Lowers or replaces the score of a response that did not end in a stop token; ``raw_scores`` stay.

    Use it when responses run into the length limit, or where the score of half a response means nothing: most reward
    models were trained on whole ones. ``score`` sets a fixed value, below what ended responses get; ``penalty`` keeps
    what the score says. Give exactly one of them. Its unit is that of the scores as the callbacks before it in the
    list have left them. Costs nothing.

    Args:
        penalty: What is taken off.
        score: What is put in place.

    Reads ``experience.ended``; reads and writes ``experience.scores``. ``response/ended_fraction`` is logged anyway.
    Source: Huang et al. 2024, arXiv:2403.17031, the "EOS trick" (a score of -1); TRL's ``missing_eos_penalty``.
    """

    def __init__(self, penalty: float | None = None, score: float | None = None) -> None:
        if (penalty is None) == (score is None):
            raise ValueError(
                f"MissingEndPenalty(penalty={penalty!r}, score={score!r}): give one of them, penalty to take it off "
                "the score or score to put it in its place"
            )
        if score is not None and not -float("inf") < score < float("inf"):
            raise ValueError(f"MissingEndPenalty(score={score!r}): must be a finite number")
        self.penalty = positive_or_none(self, "penalty", penalty)
        self.score = score

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a second penalty."""
        refuse_beside(self, trainer, MissingEndPenalty, why="both would judge the same responses")

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Lower or replace the scores."""
        scores = experience.scores
        lowered = scores.new_tensor(self.score) if self.penalty is None else scores - self.penalty
        experience.scores = torch.where(experience.ended, scores, lowered)
