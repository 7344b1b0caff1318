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


def token_statistics(
    head: HeadInputs, ids: Tensor, temperature: float = 1.0, kl_to: HeadInputs | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and the entropy of its distribution or the exact KL to another model's.

    Both are differentiable.

    Args:
        head: States and head.
        ids: The tokens.
        temperature: Divides the logits.
        kl_to: The other model's states and head; None: the entropy.

    Shapes:
        ids (N,) -> (N,), (N,), float32 (float64 stays).
    """

    def of_chunk(states: Tensor, ids: Tensor, *ref_states: Tensor) -> tuple[Tensor, Tensor]:
        logits = linear(states, head.weight, head.bias)
        if kl_to is None:
            second = entropy(logits, temperature)
        else:
            second = vocabulary_kl(logits, linear(ref_states[0], kl_to.weight, kl_to.bias), temperature)
        return token_logprobs(logits, ids, temperature), second

    others = () if kl_to is None else (kl_to.states,)
    return _in_chunks(of_chunk, len(head.weight), head.states, ids, *others)


def _in_chunks(
    function: Callable[..., tuple[Tensor, Tensor]], vocab_size: int, *tensors: Tensor
) -> tuple[Tensor, Tensor]:
    """Run over chunks of tokens; where there are several, their logits are computed again in the backward."""
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    chunks = list(zip(*(torch.split(tensor, size) for tensor in tensors), strict=True))
    if len(chunks) == 1:
        return function(*chunks[0])
    parts = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    first, second = zip(*parts, strict=True)
    return torch.cat(first), torch.cat(second)
