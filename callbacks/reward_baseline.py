"""Judge responses by what a greedy response to the same prompt would have scored."""

from typing import Any, Literal

import lightning as L

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_behind, refuse_beside, require, require_model
from lit_ppo.callbacks.reward_clipping import RewardClipping
from lit_ppo.callbacks.reward_normalization import RewardNormalization
from lit_ppo.callbacks.reward_scaling import RewardScaling
from lit_ppo.validate import one_of


class RewardBaseline(PPOCallback):
    """Subtracts from ``scores`` that of a greedy response to the same prompt; ``raw_scores`` stay.

    Use it where some prompts score high whatever the response, so that the differences between prompts drown those
    between responses; most where there is no critic to learn them. Costs one more response and score for each prompt,
    whatever ``samples_per_prompt``: at one sample a prompt, sampling and scoring take about twice as long. The
    training stream of random numbers does not move. Stands ahead of callbacks that rescale or clip scores.

    Args:
        policy: Who writes the greedy response: the ``"actor"`` as it is in this update, or the frozen
            ``"reference"``, by which a score of 0 means no better than at the start.

    Reads ``experience.group``; reads and writes ``experience.scores``. Logs ``reward/baseline``: the mean of what is
    subtracted.
    Source: Li et al. 2023, arXiv:2310.10505 (ReMax, the actor's greedy response); Shen et al. 2024,
    arXiv:2403.07708 (contrastive rewards, by responses of the starting policy that are sampled there, not greedy).
    """

    def __init__(self, policy: Literal["actor", "reference"] = "actor") -> None:
        self.policy = one_of(self, "policy", policy, ("actor", "reference"))

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module that cannot be asked for responses, a second baseline, and scores in another unit."""
        require(self, pl_module, "rollout", "score")
        refuse_beside(self, trainer, RewardBaseline, why="one baseline would be subtracted from the other")
        unit = "its baseline is in the reward's own unit"
        refuse_behind(self, trainer, RewardNormalization, RewardScaling, RewardClipping, why=unit)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse a module without the reference that is to respond."""
        if self.policy == "reference":
            require_model(self, pl_module, "reference")

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Subtract the greedy responses' scores."""
        greedy = pl_module.rollout(
            experience, samples_per_prompt=1, do_sample=False, policy=self.policy, logprobs=False, stream="baseline"
        )
        place: dict[int, int] = {}  # of each group in the rollout, which has them as they first appear
        rows = [place.setdefault(group, len(place)) for group in experience.group.tolist()]
        baseline = pl_module.score(greedy)[rows]
        experience.scores = experience.scores - baseline
        pl_module.log("reward/baseline", float(baseline.mean()))
