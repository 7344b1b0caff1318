"""Score sources: a Hugging Face reward model, any Python function, a weighted sum of several.

A source is called as ``source(experience)`` with the rows of one process and returns one number per row.
:func:`scores_of` calls it and checks the result.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

from lit_ppo.models.stored import Stored
from lit_ppo.rewards.function import RewardFunction, scores_of, source_names
from lit_ppo.rewards.model import RewardModel
from lit_ppo.rewards.signature import check_plain, takes_experience
from lit_ppo.shown import shortened, written
from lit_ppo.validate import class_name, mapping, number, refuse

__all__ = [
    "RewardFunction",
    "RewardModel",
    "Rewards",
    "ScoreSource",
    "WeightedRewards",
    "WeightedSource",
    "as_source",
    "check_columns",
    "described",
    "eval_sources",
    "place_reward_models",
    "reward_models",
    "scores_of",
    "source_names",
    "stored_models",
]

ScoreSource = RewardModel | RewardFunction | Callable[..., Any]  # classes first: configurations can then shorten names
"""``source(experience)``, or a plain reward function ``(prompts, responses, **columns)``; see :func:`as_source`."""


class _Source(TypedDict):
    source: ScoreSource


class WeightedSource(_Source, total=False):
    """One of several rewards and its weight in the sum, by default 1."""

    weight: float


class Source(Protocol):
    """A custom score source, which configurations recognise by its signature."""

    def __call__(self, experience: Any) -> Any:
        """(B,) scores."""
        ...


# The parser serialises by the first type that matches: a dict matches no class, but it would match any callable.
Rewards = RewardModel | RewardFunction | Source | dict[str, WeightedSource | ScoreSource] | ScoreSource
"""The type of ``LitPPO(rewards=...)``."""


class WeightedRewards(nn.Module):
    """The weighted sum of several sources; ``experience.extras`` gets the scores of each one under its name.

    Args:
        sources: Name -> source.
        weights: Name -> weight, by default 1. A weight of 0 only logs.
        owner: Class with the argument that gives the sources, for messages.
        argument: That argument.
    """

    def __init__(
        self,
        sources: Mapping[str, ScoreSource],
        weights: Mapping[str, float] | None = None,
        owner: object = "WeightedRewards",
        argument: str = "sources",
    ) -> None:
        super().__init__()
        weights = mapping(owner, "weights", weights)
        if not sources:
            refuse(owner, argument, {}, "is empty; name at least one source")
        for name in sources:
            if not isinstance(name, str) or not name or "." in name:
                refuse(owner, argument, name, "names must be non-empty, without dots")
        if unknown := weights.keys() - sources.keys():
            problem = f"there is no source named {', '.join(sorted(unknown))}; there are {', '.join(sources)}"
            refuse(owner, "weights", weights, problem)
        part = f"{argument}[{{!r:.80}}]".format
        self.sources = {name: as_source(source, owner, part(name)) for name, source in sources.items()}
        self.weights = {name: number(owner, f"{part(name)}.weight", weights.get(name, 1.0)) for name in sources}
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
        scores = {name: scores_of(source, experience, f"rewards[{name!r}]") for name, source in self.sources.items()}
        experience.extras.update(scores)
        device = next(iter(scores.values())).device
        return torch.stack([self.weights[name] * s.to(device) for name, s in scores.items()]).sum(0)


def as_source(rewards: Any, owner: object = "LitPPO", argument: str = "rewards") -> ScoreSource:
    """Make a score source of the value of ``LitPPO(rewards=...)``.

    Args:
        rewards: A source (an ``nn.Module``, or a callable whose only required argument is named ``experience``); a
            reward function or its import path; or a dict of those by name, each plain or as
            ``{source: ..., weight: ...}``.
        owner: Class with the argument, for messages.
        argument: The argument.

    Raises:
        TypeError: None of these was given.
    """
    if isinstance(rewards, Mapping):
        entries = _entries(rewards, owner, argument)
        weights = {name: entry["weight"] for name, entry in entries.items() if "weight" in entry}
        return WeightedRewards({k: entry["source"] for k, entry in entries.items()}, weights, owner, argument)
    if hasattr(rewards, "save_pretrained"):
        where = f"{class_name(owner)}({argument}={type(rewards).__name__})"
        raise TypeError(
            f"{where}: a model scores token ids, not responses; save it and its tokenizer in "
            "one folder (save_pretrained) and give RewardModel('folder')"
        )
    if isinstance(rewards, nn.Module):
        return rewards
    if callable(rewards) and not isinstance(rewards, type) and takes_experience(rewards):
        check_plain(f"{class_name(owner)}({argument}={written(rewards)})", rewards)
        return rewards  # type: ignore[no-any-return]
    if isinstance(rewards, str) or callable(rewards):
        return RewardFunction(rewards)
    raise TypeError(
        f"{class_name(owner)}({argument}={written(rewards)}): {type(rewards).__name__} is neither a score source nor a "
        "function; "
        "give a RewardModel, a function (prompts, responses, **columns), or a dict of those by name"
    )


def _entries(rewards: Mapping[str, Any], owner: object, argument: str) -> dict[str, Mapping[str, Any]]:
    """Named sources, each as ``{source: ..., weight: ...}`` or without the weight."""
    entries = {name: r if isinstance(r, Mapping) else {"source": r} for name, r in rewards.items()}
    for name, entry in entries.items():
        if not {"source"} <= entry.keys() <= {"source", "weight"}:
            problem = f"has the keys {shortened(', '.join(map(str, entry)), 80)}; give source and weight"
            refuse(owner, f"{argument}[{name!r:.80}]", dict(entry), problem)
    return entries


def check_columns(columns: Iterable[str], source: Any) -> None:
    """Check that the data have the columns that the reward functions of a source need.

    Args:
        columns: Names of the columns.
        source: A score source, or a weighted sum of several.

    Raises:
        TypeError: One is missing.
    """
    for part in (source, *getattr(source, "sources", {}).values()):
        if isinstance(part, RewardFunction):
            part.check_columns(columns)


def described(source: Any) -> str:
    """A score source in words."""
    if source is None:
        return "scores given by the training script"
    parts: Mapping[str, Any] = getattr(source, "sources", {})
    if parts:
        return ", ".join(f"{name}: {source.weights[name]:g} x {described(part)}" for name, part in parts.items())
    plain = isinstance(source, nn.Module) and type(source).__str__ is nn.Module.__str__
    if plain or not isinstance(source, nn.Module | RewardFunction):
        return f"`{getattr(source, '__qualname__', type(source).__qualname__)}`"
    return f"`{source}`"


def eval_sources(owner: object, rewards: Any, eval_rewards: Any) -> WeightedRewards:
    """Make one score source of ``eval_rewards``, which score held-out responses.

    Args:
        owner: The object with these arguments, for messages.
        rewards: The training reward.
        eval_rewards: Name -> source, plain or as ``{source: ...}``.

    Raises:
        ValueError: It is not a dict by name, a source has a weight, or a training reward has one of the names.
    """
    if not isinstance(eval_rewards, Mapping) or not eval_rewards:
        refuse(owner, "eval_rewards", eval_rewards, "give a dict of score sources by name, or none")
    if taken := [name for name in source_names(rewards) if name in eval_rewards]:
        problem = "a training reward has this name, and both would be logged under it; rename one of them"
        refuse(owner, "eval_rewards", ", ".join(taken), problem)
    entries = _entries(eval_rewards, owner, "eval_rewards")
    for name, entry in entries.items():
        if "weight" in entry:
            problem = "each of these rewards is logged by itself and never summed; leave its weight out"
            refuse(owner, f"eval_rewards[{name!r:.80}].weight", entry["weight"], problem)
    return WeightedRewards({name: entry["source"] for name, entry in entries.items()}, None, owner, "eval_rewards")


def reward_models(source: Any) -> list[RewardModel]:
    """The reward models in a score source."""
    return [part for part in source.modules() if isinstance(part, RewardModel)] if hasattr(source, "modules") else []


def stored_models(argument: str, source: Any) -> dict[str, Stored]:
    """Where the reward models in a score source were loaded from, by argument and name.

    Args:
        argument: That of the source, such as ``rewards``.
        source: A score source whose models are loaded, or None.
    """
    parts = source.named_modules() if isinstance(source, nn.Module) else []
    found = {name.removeprefix("models."): part.model for name, part in parts if isinstance(part, RewardModel)}
    return {f"{argument}.{name}".rstrip("."): model.stored for name, model in found.items() if model is not None}


def place_reward_models(strategy: Any, *sources: Any) -> None:
    """Load the models of score sources and freeze them; where the strategy shards, each rank keeps its shard.

    Args:
        strategy: The Trainer's; None without one.
        *sources: Score sources, or None.
    """
    for source in sources:
        for model in reward_models(source):
            model.build(strategy)
        if hasattr(source, "build"):
            source.build()
        if isinstance(source, nn.Module):
            source.requires_grad_(False).eval()
