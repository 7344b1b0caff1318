"""Train only on prompts whose responses have different scores."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside
from lit_ppo.callbacks.rejection_sampling import RejectionSampling
from lit_ppo.constructor import constructor
from lit_ppo.functional import groups_alike
from lit_ppo.validate import integer, non_negative


class DynamicSampling(PPOCallback):
    """Removes all responses to a prompt whose scores are all alike.

    Use it with an estimator that compares the responses to a prompt, and scores that are often alike, as with answers
    that are right or wrong: these responses have an advantage of 0, and only make the mean of the loss smaller. Nothing
    is sampled in their place, so raise the data's ``batch_size`` until enough are left; if fewer rows than
    ``minibatch_size`` are left, they form one minibatch. It pauses while the actor is frozen. Costs nothing.

    If fewer than ``min_groups`` prompts are left, the update makes no optimizer step, keeps all rows for its metrics,
    and warns the first time. Else metrics such as ``objective/score`` are of the rows that are left. Place it after
    callbacks that change scores, and after ``PrioritizedSampling``, which then counts all responses.

    Args:
        min_groups: Prompts that an update needs at least.
        tolerance: Difference between the highest and the lowest score of a prompt up to which they are alike.

    Reads ``experience.scores``, ``raw_scores`` and ``group``; removes rows, or writes ``experience.exhausted`` where
    too few are left. Logs ``data/kept_fraction`` of the prompts,
    ``data/score_of_all``, the mean of ``raw_scores`` before rows are removed, and ``data/skipped_update``, 0 or 1.
    Source: Yu et al. 2025, arXiv:2503.14476, section 3.2 (DAPO; there, until the batch is full again).
    """

    reads = ("scores", "raw_scores", "group")

    @constructor
    def __init__(self, min_groups: int = 1, tolerance: float = 0.0) -> None:
        self.min_groups = integer(self, "min_groups", min_groups)
        self.tolerance = non_negative(self, "tolerance", tolerance)
        self._has_warned = False

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, DynamicSampling, why="the second would find nothing to remove")
        refuse_beside(self, trainer, RejectionSampling, why="the second keeps one response per prompt, the first none")
        samples = getattr(pl_module, "samples_per_prompt", 2)
        if samples < 2:
            raise ValueError(
                f"DynamicSampling compares the responses to a prompt, but {type(pl_module).__name__}("
                f"samples_per_prompt={samples!r}) has one of each; sample at least 2, or remove the callback"
            )

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        if getattr(pl_module, "actor_frozen", False):
            return
        alike, n_groups = groups_alike(experience.scores, experience.group, self.tolerance), _count(experience.group)
        if n_groups == len(alike):
            raise ValueError(
                f"DynamicSampling: each of the {n_groups} responses is alone in its group; sample several responses to "
                "a prompt and give them the same number in experience.group"
            )
        n_left = _count(experience.group[~alike])
        pl_module.log("data/kept_fraction", n_left / n_groups)
        pl_module.log("data/score_of_all", float(experience.raw_scores.mean()))
        pl_module.log("data/skipped_update", float(n_left < self.min_groups))
        if n_left >= self.min_groups:
            experience.keep(~alike)
            return
        experience.exhausted = True
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"DynamicSampling(min_groups={self.min_groups}): {n_left} of {n_groups} prompts have responses with "
                "different scores, so this update makes no optimizer step; data/skipped_update marks such updates; "
                "use more prompts or samples per update, or prompts that are neither too easy nor too hard"
            )


def _count(group: Any) -> int:
    return len(group.unique())
