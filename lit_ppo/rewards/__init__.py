"""Score sources: a Hugging Face reward model, any Python function, a weighted sum of several.

A source is called as ``source(experience)`` and gives one float32 score a row. It sees the rows of one process
and knows nothing of others.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

from lit_ppo.rewards.function import RewardFunction, check_scores, takes_experience
from lit_ppo.rewards.model import RewardModel

__all__ = [
    "RewardFunction",
    "RewardModel",
    "Rewards",
    "ScoreSource",
    "WeightedRewards",
    "WeightedSource",
    "as_source",
    "judges",
]

ScoreSource = RewardModel | RewardFunction | Callable[..., Any]  # classes first: configurations name them shortly
"""``source(experience)``, or a plain reward function ``(prompts, responses, **columns)``; see :func:`as_source`."""


class WeightedSource(TypedDict):
    """One of several rewards, and what its scores are multiplied by."""

    source: ScoreSource
    weight: float


class Source(Protocol):
    """A score source of one's own, as configurations recognise it by its signature."""

    def __call__(self, experience: Any) -> Any:
        """(B,) scores."""
        ...


# In this order a parser can write down what it has read: a dict matches neither a class nor, later, any callable.
Rewards = RewardModel | RewardFunction | nn.Module | Source | dict[str, WeightedSource | ScoreSource] | ScoreSource
"""What ``LitPPO(rewards=...)`` takes."""


class WeightedRewards(nn.Module):
    """The weighted sum of several sources; each one's own scores are left in ``experience.extras`` under its name.

    Args:
        sources: Name -> source.
        weights: Name -> weight, 1 for those not named. A weight of 0 only reports.
    """

    def __init__(self, sources: Mapping[str, ScoreSource], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        if not sources:
            raise ValueError("WeightedRewards(sources={}): is empty; name at least one source")
        weights = dict(weights or {})
        unknown = weights.keys() - sources.keys()
        if unknown:
            raise ValueError(
                f"WeightedRewards(weights={weights}): there is no source named {', '.join(sorted(unknown))}; "
                f"there are {', '.join(sources)}"
            )
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ValueError(f"WeightedRewards(weights={weights}): the weight of {name} must be a finite number")
        for name in sources:
            if not name or "." in name:
                raise ValueError(f"WeightedRewards(sources={{{name!r}: ...}}): names must be non-empty, without dots")
        self.sources = {name: as_source(source) for name, source in sources.items()}
        self.weights = {name: float(weights.get(name, 1.0)) for name in sources}
        self.models = nn.ModuleDict({k: source for k, source in self.sources.items() if isinstance(source, nn.Module)})

    def build(self) -> None:
        """Load the sources that load something."""
        for source in self.sources.values():
            if hasattr(source, "build"):
                source.build()

    def forward(self, experience: Any) -> Tensor:
        """Weighted sum of the scores.

        Shapes:
            -> (B,), float32.
        """
        count, responses = len(experience.responses), experience.responses
        scores = {
            name: check_scores(source(experience), count, f"rewards[{name!r}]", responses)
            for name, source in self.sources.items()
        }
        experience.extras.update(scores)
        device = next(iter(scores.values())).device
        return torch.stack([self.weights[name] * s.to(device) for name, s in scores.items()]).sum(0)


def as_source(rewards: Any) -> ScoreSource:
    """A score source out of whatever ``LitPPO(rewards=...)`` was given.

    Args:
        rewards: A source (an ``nn.Module``, or a callable whose one required argument is named ``experience``); a
            reward function, or where to import it from; or a dict of those by name, each plain or as
            ``{source: ..., weight: ...}``.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(rewards, Mapping):
        weighted = {name: r if isinstance(r, Mapping) else {"source": r} for name, r in rewards.items()}
        for name, entry in weighted.items():
            if not {"source"} <= entry.keys() <= {"source", "weight"}:
                raise ValueError(f"rewards[{name!r}] has the keys {', '.join(entry)}; give source and weight")
        weights = {name: entry["weight"] for name, entry in weighted.items() if "weight" in entry}
        return WeightedRewards({name: entry["source"] for name, entry in weighted.items()}, weights)
    if isinstance(rewards, nn.Module):
        return rewards
    if callable(rewards) and takes_experience(rewards):
        return rewards  # type: ignore[no-any-return]
    if isinstance(rewards, str) or callable(rewards):
        return RewardFunction(rewards)
    raise TypeError(
        f"rewards={rewards!r}: {type(rewards).__name__} is neither a score source nor a function; "
        "give a RewardModel, a function (prompts, responses, **columns), or a dict of those by name"
    )


def judges(owner: str, rewards: Any, eval_rewards: Any) -> WeightedRewards:
    """The score sources that judge held-out responses.

    Args:
        owner: The class that was given them, for messages.
        rewards: What is trained on.
        eval_rewards: Name -> source.

    Raises:
        ValueError: They are no dict by name, or one has the name of a training reward.
    """
    if not isinstance(eval_rewards, Mapping) or not eval_rewards:
        raise ValueError(f"{owner}(eval_rewards={eval_rewards!r}): give a dict of score sources by name, or none")
    taken = [name for name in getattr(rewards, "sources", {}) if name in eval_rewards]
    if taken:
        raise ValueError(
            f"{owner}(eval_rewards): {', '.join(taken)} is a training reward's name, and both would be logged under "
            "it; rename one of them"
        )
    return WeightedRewards(eval_rewards)
