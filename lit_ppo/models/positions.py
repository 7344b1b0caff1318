"""How many tokens a model can read, and which rows may share a forward.

Some rotary embeddings choose their frequencies by the longest row of a forward: LongRoPE has one set for rows up to
``original_max_position_embeddings`` and one for longer rows, dynamic NTK a set for every length beyond its limit. A row
must get its own frequencies, whichever rows are computed beside it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from lit_ppo.parallel.sharding import is_sharded

T = TypeVar("T")


@dataclass(frozen=True)
class RopeBound:
    """The number of tokens from which on a row's rotary frequencies depend on its length."""

    tokens: int
    kind: str  # longrope, dynamic

    def side(self, length: int) -> int:
        """Rows of the same side may share a forward."""
        if length <= self.tokens:
            return 0
        return 1 if self.kind == "longrope" else length


def _once_a_model(function: Callable[[nn.Module], T]) -> Callable[[nn.Module], T]:
    """Keep the result for each model: batches ask again and again."""
    results: WeakKeyDictionary[nn.Module, T] = WeakKeyDictionary()

    @wraps(function)
    def remembered(model: nn.Module) -> T:
        if model not in results:
            results[model] = function(model)
        return results[model]

    return remembered


UNBOUNDED: WeakSet[nn.Module] = WeakSet()
"""Models that were asked for their bound and have none: nearly all. Any rows may share a forward of theirs."""


@_once_a_model
def rope_bound(model: nn.Module) -> RopeBound | None:
    """The bound of a model; None where frequencies never depend on the length of a row."""
    found = [bound for module in model.modules() for bound in _bounds_of(module)]
    if not found:
        UNBOUNDED.add(model)
    return min(found, key=lambda bound: bound.tokens, default=None)


def row_groups(model: nn.Module, lengths: Sequence[int], *, is_gathered: bool = False) -> list[list[int]]:
    """Numbers of the rows that may share a forward.

    Args:
        model: Hugging Face model.
        lengths: Tokens of each row.
        is_gathered: Each rank holds the full model, and may run any number of forwards.

    Raises:
        ValueError: There are several groups, and the model is sharded: ranks would run unequal numbers of forwards.
    """
    bound = rope_bound(model)
    if bound is None or max(lengths, default=0) <= bound.tokens:
        return [list(range(len(lengths)))]
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(bound.side(length), []).append(row)
    if len(groups) > 1 and not is_gathered and is_sharded(model):
        raise ValueError(
            f"{type(model).__name__}: rows of {min(lengths)} to {max(lengths)} tokens cannot share a forward of a "
            f"sharded model, whose {bound.kind} RoPE changes at {bound.tokens} tokens; keep all rows on one side, or "
            "use 'ddp'"
        )
    return list(groups.values())


@_once_a_model
def token_limit(model: nn.Module) -> int | None:
    """The most tokens that a model can read; None: unlimited.

    RoBERTa and its relatives count positions from behind the padding token's: their table is longer by so many.
    """
    config: Any = model.config
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None)]
    for name, module in model.named_modules():
        padding, table = getattr(module, "padding_idx", None), getattr(module, "weight", None)
        if "position" in name.rpartition(".")[2] and padding is not None and table is not None:
            limits.append(len(table) - padding - 1)
    return min((int(limit) for limit in limits if limit), default=None)


def safe_length(models: Any) -> float:
    """Prompts of at most this many tokens pass :func:`check_length`, without a look at each model.

    Args:
        models: See :func:`check_length`.
    """
    bounds = [rope_bound(model) for model in _readers(models).values()]
    limits = [token_limit(model) for model in _readers(models).values()]
    tokens = [limit for limit in limits if limit is not None] + [bound.tokens for bound in bounds if bound is not None]
    return min(tokens, default=math.inf) - float(models.generation.max_new_tokens)


def check_length(models: Any, prompts: Sequence[int]) -> None:
    """Check that prompt plus new tokens fit every model that reads them, and that sampling is the same as training.

    Args:
        models: ``actor``, ``reference`` and ``critic``, and the ``generation`` settings.
        prompts: Tokens of each prompt.

    Raises:
        ValueError: They do not.
    """
    new, longest = int(models.generation.max_new_tokens), max(prompts)
    for name, model in _readers(models).items():
        limit, bound = token_limit(model), rope_bound(model)
        if limit is not None and longest + new > limit:
            raise ValueError(
                f"LitPPO(generation={{'max_new_tokens': {new}}}): a prompt of {longest} tokens plus {new} new "
                f"tokens exceeds the token limit of the {name}, {limit}; lower max_new_tokens or max_prompt_length"
            )
        crossing = [n for n in prompts if bound is not None and bound.side(n) != bound.side(n + new)]
        if bound is not None and crossing and name != "critic":
            raise ValueError(
                f"LitPPO(generation={{'max_new_tokens': {new}}}): a prompt of {max(crossing)} tokens plus {new} new "
                f"tokens crosses {bound.tokens}, where the {bound.kind} RoPE of the {name} changes for the full row: "
                "its first tokens would be sampled with other frequencies than they are trained with; lower "
                "max_new_tokens or max_prompt_length, or make short_factor and long_factor the same"
            )
        row_groups(model, [n + extra for n in (min(prompts), longest) for extra in (0, new)])


def _readers(models: Any) -> dict[str, nn.Module]:
    """The models that read prompts and responses, by name."""
    readers = {"actor": models.actor.model}
    if models.reference is not None:
        readers["reference"] = models.reference.model
    if models.critic is not None:
        readers["critic"] = models.critic.backbone
    return readers


def _bounds_of(module: nn.Module) -> Iterator[RopeBound]:
    kinds: Any = getattr(module, "rope_type", None)
    config: Any = getattr(module, "config", None)
    all_parameters: Any = getattr(config, "rope_parameters", None) or {}
    for layer, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
        parameters = all_parameters if layer is None else all_parameters.get(layer) or {}
        if kind == "longrope":
            differ = parameters.get("short_factor") != parameters.get("long_factor") or "long_mscale" in parameters
            if differ:
                yield RopeBound(int(parameters["original_max_position_embeddings"]), "longrope")
        elif kind is not None and "dynamic" in kind:
            yield RopeBound(int(getattr(module, "original_max_seq_len", config.max_position_embeddings)), "dynamic")
