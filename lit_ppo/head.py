"""The language-model head on target tokens only, in chunks: no (B, T, V) tensor ever exists."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lit_ppo.functional import entropy, token_logprobs, vocabulary_kl

CHUNK_ELEMENTS = 2**23  # logits held at a time: 32 MiB in float32


class HeadInputs(NamedTuple):
    """A model's states at the N target tokens and the head that turns them into logits."""

    states: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)


def logprobs_and_entropy(head: HeadInputs, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of its distribution, both differentiable.

    Args:
        head: States and head.
        ids: The tokens.
        temperature: Divides the logits.

    Shapes:
        ids (N,) -> (N,), (N,), float32 (float64 stays).
    """

    def of_chunk(states: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        logits = linear(states, head.weight, head.bias)
        return token_logprobs(logits, ids, temperature), entropy(logits, temperature)

    logprobs, entropies = _in_chunks(of_chunk, len(head.weight), head.states, ids)
    return logprobs, entropies


def exact_kl(head: HeadInputs, ref: HeadInputs, temperature: float = 1.0) -> Tensor:
    """KL over the whole vocabulary from one model to another, differentiable in the first.

    Shapes:
        -> (N,), nats.
    """

    def of_chunk(states: Tensor, ref_states: Tensor) -> tuple[Tensor, ...]:
        logits, ref_logits = linear(states, head.weight, head.bias), linear(ref_states, ref.weight, ref.bias)
        return (vocabulary_kl(logits, ref_logits, temperature),)

    (kl,) = _in_chunks(of_chunk, len(head.weight), head.states, ref.states)
    return kl


def _in_chunks(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], vocab_size: int, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Run over chunks of tokens; where there are several, their logits are computed again in the backward."""
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    chunks = list(zip(*(torch.split(tensor, size) for tensor in tensors), strict=True))
    if len(chunks) == 1:
        return function(*chunks[0])
    parts = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))
