"""The language-model head on target tokens only, in chunks: no (B, T, V) tensor ever exists."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_ppo.activations import free_bytes
from lit_ppo.functional import float32_linear, summed_in_float32

CHUNK_ELEMENTS = 2**23  # logits worked on at a time: 32 MiB in float32
KEPT_ELEMENTS = 2**25  # probabilities kept for the backward, 128 MiB; beyond that, logits are computed again
CUDA_CHUNK_ELEMENTS = 2**27  # at most; each chunk reads the head again, and more tokens keep a GPU busy
CUDA_SHARE = 1 / 8  # of the free memory, for a chunk


class HeadInputs(NamedTuple):
    """A model's states at the N target tokens and the head that turns them into logits."""

    states: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)


class _Head(NamedTuple):
    """A head whose products are summed in float32."""

    inputs: HeadInputs
    rounded: bool  # float32 copies of bfloat16 numbers


class Chunks(NamedTuple):
    """How much of the logits to work on at a time."""

    tokens: int  # in a chunk
    kept: int  # probabilities that are kept for the backward


def chunks_for(kind: str, free: int, vocabulary: int, dtype: torch.dtype) -> Chunks:
    """The size of chunks on a kind of device.

    Args:
        kind: Of device, such as ``cuda``.
        free: Bytes that are free there; only read for ``cuda``.
        vocabulary: Tokens.
        dtype: Of the products.

    >>> chunks_for("cpu", 0, 151_936, torch.float32)
    Chunks(tokens=55, kept=33554432)
    >>> chunks_for("cuda", 40 * 2**30, 151_936, torch.bfloat16)
    Chunks(tokens=883, kept=134217728)
    """
    if kind != "cuda":
        return Chunks(max(1, CHUNK_ELEMENTS // vocabulary), KEPT_ELEMENTS)
    # five tensors of at least float32, and the gradient in the dtype of the products
    bytes_per_logit = 5 * max(4, dtype.itemsize) + dtype.itemsize
    fits = int(free * CUDA_SHARE) // bytes_per_logit
    elements = min(CUDA_CHUNK_ELEMENTS, max(CHUNK_ELEMENTS, 2 ** max(0, fits.bit_length() - 1)))
    return Chunks(max(1, elements // vocabulary), elements)


@cache
def _free_bytes(device: torch.device) -> int:
    """Free memory of a GPU when this is first asked: chunks of one size keep the order of sums, and so all bits."""
    if device.type != "cuda":
        return 0
    return free_bytes(device)


def token_statistics(
    head: HeadInputs, ids: Tensor, temperature: float = 1.0, kl_to: HeadInputs | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and the entropy of its distribution or the exact KL to another model's.

    Both are differentiable, once. Under autocast the products are taken in its dtype; sums and all else are float32.

    Args:
        head: States and head.
        ids: The tokens.
        temperature: Divides the logits.
        kl_to: The other model's states and head; None: the entropy.

    Shapes:
        ids (N,) -> (N,), (N,), float32 (float64 stays).
    """
    device = head.states.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    dtype = autocast or head.weight.dtype
    reference = None if kl_to is None else _cast(*kl_to, autocast or kl_to.weight.dtype)
    keep = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        logprobs, kl = _Statistics.apply(*head, ids, temperature, dtype, reference, keep)  # type: ignore[no-untyped-call]
    # the entropy is the KL to nothing, log q = 0, with its sign turned
    return logprobs, kl if kl_to is not None else -kl


class _Statistics(torch.autograd.Function):
    r"""Values and gradients of one pass over chunks of tokens.

    With :math:`z = W x + b`, :math:`p = \mathrm{softmax}(z / \tau)` and :math:`D = \sum_v p_v (\log p_v - \log q_v)`:

    .. math::
        \partial \log p_a / \partial z_v = (1_{v = a} - p_v) / \tau, \quad
        \partial D / \partial z_v = p_v (\log p_v - \log q_v - D) / \tau
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        dtype: torch.dtype,
        reference: HeadInputs | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        head = _cast(states, weight, bias, dtype)
        at_least_float32 = torch.promote_types(dtype, torch.float32)
        logprobs, divergence = (torch.empty(len(ids), dtype=at_least_float32, device=ids.device) for _ in range(2))
        kept: list[Tensor] = []
        sizes = chunks_for(ids.device.type, _free_bytes(ids.device), len(weight), dtype)
        for_logits, for_ratio = _for_logits(head), None if reference is None else _for_logits(reference)
        for chunk in _chunks(len(ids), sizes):
            log_p = _log_softmax(for_logits, chunk, temperature)
            p = log_p.exp()
            logprobs[chunk] = log_p.gather(1, ids[chunk, None]).squeeze(1)
            divergence[chunk] = _dot(p, _log_ratio(log_p, for_ratio, chunk, temperature))
            if keep and chunk.stop * p.shape[1] <= sizes.kept:
                kept.append(p)
        ctx.save_for_backward(states, weight, bias, ids, divergence, *kept)
        ctx.temperature, ctx.dtype, ctx.reference, ctx.sizes = temperature, dtype, for_ratio, sizes
        ctx.set_materialize_grads(False)  # nobody may ask for the entropy's gradient
        return logprobs, divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor | None, d_divergence: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_logprobs is None and d_divergence is None:
            return (None,) * 8
        states, weight, bias, ids, divergence, *kept = ctx.saved_tensors
        head = _cast(states, weight, bias, ctx.dtype)
        all_kept = len(kept) == len(_chunks(len(ids), ctx.sizes))
        for_logits = None if all_kept else _for_logits(head)
        wants_states, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        d_states = torch.empty_like(states) if wants_states else None
        d_weight: Tensor | None = None
        d_bias = torch.zeros_like(bias) if wants_bias else None
        sums = torch.promote_types(weight.dtype, torch.float32)
        for i, chunk in enumerate(_chunks(len(ids), ctx.sizes)):
            p = (
                kept[i]
                if for_logits is None or i < len(kept)
                else _log_softmax(for_logits, chunk, ctx.temperature).exp_()
            )
            d_logits = _d_logits(ctx, p, chunk, ids, divergence, d_logprobs, d_divergence)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(ctx.dtype)
            if d_states is not None:
                d_states[chunk] = d_logits @ head.weight
            if wants_weight:
                d_weight = _add_product(d_weight, d_logits.T, head.states[chunk], sums)
        if wants_weight and d_weight is None:  # no tokens
            d_weight = torch.zeros_like(weight)
        return d_states, None if d_weight is None else d_weight.to(weight.dtype), d_bias, None, None, None, None, None


def _d_logits(
    ctx: Any,
    p: Tensor,
    chunk: slice,
    ids: Tensor,
    divergence: Tensor,
    d_logprobs: Tensor | None,
    d_divergence: Tensor | None,
) -> Tensor:
    """Gradient of a chunk's logits, (n, V)."""
    if d_divergence is None:
        assert d_logprobs is not None
        gradient: Tensor = p * (d_logprobs[chunk, None] / -ctx.temperature)
    else:
        # a probability of 0 takes its log out of the gradient, if only that log is no infinity once weighted
        log_ratio = _log_ratio(p.log().clamp_(min=-1e4), ctx.reference, chunk, ctx.temperature)
        per_logit = (log_ratio - divergence[chunk, None]) * d_divergence[chunk, None]
        if d_logprobs is not None:
            per_logit -= d_logprobs[chunk, None]
        gradient = per_logit.mul_(p).div_(ctx.temperature)
    if d_logprobs is not None:
        gradient.scatter_add_(1, ids[chunk, None], d_logprobs[chunk, None] / ctx.temperature)
    return gradient


def _cast(states: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> HeadInputs:
    """A head in the dtype of its products."""
    return HeadInputs(states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _for_logits(head: HeadInputs) -> _Head:
    """A head whose products are summed in float32: bf16 logits would cost 0.017 nats a token.

    Where the device cannot do that with 16-bit numbers, these are copied to float32, which changes none.
    """
    if summed_in_float32(head.weight):
        return _Head(head, False)
    return _Head(_cast(*head, torch.float32), head.weight.dtype == torch.bfloat16)


def _chunks(n: int, sizes: Chunks) -> Sequence[slice]:
    """Runs of tokens whose logits are worked on together."""
    return [slice(start, min(start + sizes.tokens, n)) for start in range(0, n, sizes.tokens)]


def _log_softmax(head: _Head, chunk: slice, temperature: float) -> Tensor:
    """Log-probabilities of a chunk, (n, V), at least float32."""
    states, weight, bias = head.inputs
    logits = float32_linear(states[chunk], weight, bias, rounded=head.rounded)
    return _finite(torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1))


def _finite(log_p: Tensor) -> Tensor:
    """Without -inf, which times 0 would be NaN: a token that cannot occur adds nothing."""
    return log_p.clamp_(min=torch.finfo(log_p.dtype).min)


def _log_ratio(log_p: Tensor, reference: _Head | None, chunk: slice, temperature: float) -> Tensor:
    """``log p - log q``."""
    return log_p if reference is None else log_p - _log_softmax(reference, chunk, temperature)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Row by row, without the product as a tensor: (n, V), (n, V) -> (n,)."""
    return torch.bmm(x.unsqueeze(1), y.unsqueeze(2)).flatten()


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + a @ b``, in place; the first one is not added to zeros, which takes as long as the product."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if dtype == a.dtype else total.add_(a @ b)


class _Float32Linear(torch.autograd.Function):
    """A linear layer of 16-bit numbers whose output is their sums in float32; gradients as those of a plain one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return float32_linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        d_bias = d_output.sum(0).to(weight.dtype) if wants_bias else None
        d_output = d_output.to(weight.dtype)
        return d_output @ weight if wants_x else None, d_output.T @ x if wants_weight else None, d_bias


def use_float32_logits(model: Any) -> None:
    """Let the head of a causal LM return float32 sums where it multiplies 16-bit numbers, under autocast or not.

    Args:
        model: Hugging Face causal LM, not sharded yet; a head of another kind than ``nn.Linear`` stays as it is.
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        vars(head)["forward"] = partial(_float32_logits, head, head.forward)


def _float32_logits(head: nn.Linear, forward: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    if dtype.itemsize >= 4:
        return forward(states)
    with torch.autocast(kind, enabled=False):
        inputs = _cast(states.flatten(0, -2), head.weight, head.bias, dtype)
        logits: Tensor = _Float32Linear.apply(*inputs)  # type: ignore[no-untyped-call]
    unflattened: Tensor = logits.unflatten(0, states.shape[:-1])
    return unflattened
