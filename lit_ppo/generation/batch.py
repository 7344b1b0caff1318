"""What one call samples, as the decode loops share it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.utils import ALL_CACHE_NAMES

from lit_ppo.generation.engine import Progress

CACHE: str = ALL_CACHE_NAMES[0]
"""Of keys and values, as models take and return it: ``past_key_values`` before transformers 5.24, then ``cache``."""

BY_LOGITS = (
    EpsilonLogitsWarper, InfNanRemoveLogitsProcessor, LogitNormalization, MinPLogitsWarper,
    SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper,
)  # fmt: skip
"""Processors that look at each row's logits alone: neither at its tokens, nor at which row it is."""


FEW = 16  # a longer list of tokens to suppress is looked up in a way that waits for the device


def by_logits_alone(processor: Any) -> bool:
    """Whether a processor can be part of a step that never waits for the device."""
    return isinstance(processor, BY_LOGITS) and len(getattr(processor, "suppress_tokens", ())) <= FEW


@dataclass(frozen=True)
class Batch:
    """Rows to sample and how."""

    model: Any
    input_ids: Tensor  # prompts, (B, P), left-padded
    mask: Tensor  # True at their tokens
    processors: Any
    config: GenerationConfig
    draws: Tensor | None  # (B, max_new_tokens), float64, where a device computes in it; None: greedy
    stops: Tensor
    logprobs: bool
    progress: Progress | None


def process_in_place(processors: Any, input_ids: Tensor, raw: Tensor, rows: Tensor) -> Tensor:
    """Apply logits processors that hold one entry per row, so that rows which have ended keep their place.

    Shapes:
        input_ids (B, L), raw (n, V), rows (n,) -> (n, V).
    """
    everywhere = raw.new_zeros(len(input_ids), raw.shape[1]).index_put((rows,), raw)
    processed: Tensor = processors(input_ids, everywhere)
    return processed[rows]
