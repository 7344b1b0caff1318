"""Subtract the score of a greedy response to the same prompt."""

from typing import Any, Literal

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_behind, refuse_beside, refuse_none, require
from lit_ppo.callbacks.reward_clipping import RewardClipping
from lit_ppo.callbacks.reward_normalization import RewardNormalization
from lit_ppo.callbacks.reward_scaling import RewardScaling
from lit_ppo.constructor import constructor
from lit_ppo.validate import one_of


class RewardBaseline(PPOCallback):
    """Subtracts the score of a greedy response to the same prompt from ``scores``; ``raw_scores`` do not change.

    Use it when some prompts score high with any response, so that differences between prompts hide those between
    responses; above all without a critic, which could learn them. Costs one more response and score per prompt,
    whatever ``samples_per_prompt``: with one sample per prompt, sampling and scoring take about twice as long. It does
    not change the random numbers of training. Place it before callbacks that rescale or clip scores.

    Args:
        policy: The policy of the greedy response: the current ``"actor"``, or the frozen ``"reference"``, with which
            a score of 0 means as good as at the start.

    Reads ``experience.group``; reads and writes ``experience.scores``. Logs ``reward/baseline``: the mean of the
    subtracted scores.
    Source: Li et al. 2023, arXiv:2310.10505 (ReMax, the actor's greedy response); Shen et al. 2024,
    arXiv:2403.07708 (contrastive rewards; there, the responses of the starting policy are sampled, not greedy).
    """

    reads = ("group", "scores")

    @constructor
    def __init__(self, policy: Literal["actor", "reference"] = "actor") -> None:
        self.policy = one_of(self, "policy", policy, ("actor", "reference"))

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        require(self, pl_module, "rollout", "score")
        refuse_beside(self, trainer, RewardBaseline, why="the second would subtract its baseline from a difference")
        unit = "its baseline is in the unit of the raw scores"
        refuse_behind(self, trainer, RewardNormalization, RewardScaling, RewardClipping, why=unit)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.policy == "reference":
            refuse_none(self, pl_module, "reference")

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        greedy = pl_module.rollout(
            experience, samples_per_prompt=1, do_sample=False, policy=self.policy, logprobs=False, stream="baseline"
        )
        place: dict[int, int] = {}  # of each group in the rollout, which keeps the order of first appearance
        rows = [place.setdefault(group, len(place)) for group in experience.group.tolist()]
        baseline = pl_module.score(greedy)[rows]
        experience.scores = experience.scores - baseline
        pl_module.log("reward/baseline", float(baseline.mean()))
