"""The language-model head on target tokens only, in chunks: no (B, T, V) tensor ever exists."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_ppo.activations import free_bytes
from lit_ppo.functional import (
    add_product,
    choose,
    float32_linear,
    for_products,
    product_rows,
    softmax_weights,
    token_sums,
    token_sums_gradient,
    with_rows,
)

CHUNK_ELEMENTS = 2**23  # logits worked on at a time, at most: 32 MiB in float32
CACHED_ELEMENTS, CACHED_TOKENS = 2**20, 256  # stay in a CPU's caches; fewer tokens would read the head too often
KEPT_ELEMENTS = 2**25  # probabilities kept for the backward, 128 MiB; beyond that, logits are computed again
CUDA_CHUNK_ELEMENTS = 2**27  # at most; each chunk reads the head again, and more tokens keep a GPU busy
CUDA_SHARE = 1 / 8  # of the free memory, for a chunk


class HeadInputs(NamedTuple):
    """A model's states at the N target tokens and the head that turns them into logits."""

    states: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)


class _Head(NamedTuple):
    """A head whose products are summed in float32: bf16 logits would cost 0.017 nats a token."""

    inputs: HeadInputs  # for products
    dtype: torch.dtype  # to which they round


class _Options(NamedTuple):
    temperature: float
    dtype: torch.dtype  # of the products
    keep: bool  # what the backward needs
    compiled: bool


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
        tokens = min(max(CACHED_TOKENS, CACHED_ELEMENTS // vocabulary), CHUNK_ELEMENTS // vocabulary)
        return Chunks(max(1, tokens), KEPT_ELEMENTS)
    # five tensors of at least float32, and the gradient in the dtype of the products
    bytes_per_logit = 5 * max(4, dtype.itemsize) + dtype.itemsize
    fits = int(free * CUDA_SHARE) // bytes_per_logit
    elements = min(CUDA_CHUNK_ELEMENTS, max(CHUNK_ELEMENTS, 2 ** max(0, fits.bit_length() - 1)))
    return Chunks(max(1, elements // vocabulary), elements)


@cache
def _free_bytes(device: torch.device) -> int:
    """Free memory of a GPU when this is first asked: chunks of one size keep the order of sums, and so all bits."""
    return free_bytes(device) if device.type == "cuda" else 0


def token_statistics(
    head: HeadInputs, ids: Tensor, temperature: float = 1.0, kl_to: HeadInputs | None = None, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and the entropy of its distribution or the exact KL to another model's.

    Both are differentiable, once. Under autocast the products are taken in its dtype; all else is float32.

    Args:
        head: States and head.
        ids: The tokens; or K of them for each state, which then has as many log-probabilities.
        temperature: Divides the logits.
        kl_to: The other model's states and head; None: the entropy.
        compiled: Read the logits in compiled code, in fewer passes; not with ``kl_to`` or several tokens.

    Shapes:
        ids (N,) -> (N,), (N,); or (N, K) -> (N, K), (N,); float32 (float64 stays).
    """
    kind, n = ids.device.type, len(ids)
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    rows = product_rows(n, ids.device)
    head, ids = head._replace(states=with_rows(head.states, rows)), with_rows(ids, rows)
    if kl_to is not None:
        kl_to = kl_to._replace(states=with_rows(kl_to.states, rows))
    reference = None if kl_to is None else _prepared(kl_to, autocast or kl_to.weight.dtype)
    with torch.autocast(kind, enabled=False):
        compiled = compiled and kl_to is None and ids.dim() == 1
        options = _Options(temperature, autocast or head.weight.dtype, torch.is_grad_enabled(), compiled)
        logprobs, kl = _Statistics.apply(*head, ids, reference, options)  # type: ignore[no-untyped-call]
    # the entropy is the KL to nothing, log q = 0, with its sign turned
    return logprobs[:n], kl[:n] if kl_to is not None else -kl[:n]


@torch.no_grad()
def read_logprobs(
    head: HeadInputs, ids: Tensor, temperature: float = 1.0, draws: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens, and of K more that are sampled; without gradients and entropies, which take time.

    Args:
        head: States and head.
        ids: J tokens for each state.
        temperature: Divides the logits.
        draws: See :func:`lit_ppo.functional.inverse_cdf`; None: sample none.

    Returns:
        The tokens, and those that were sampled behind them; their log-probabilities.

    Shapes:
        ids (N, J), draws (N, K) -> (N, J + K), (N, J + K); float32 (float64 stays).
    """
    device, n = head.states.device, ids.shape[1]
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else head.weight.dtype
    ids = torch.nn.functional.pad(ids, (0, 0 if draws is None else draws.shape[1]))
    logprobs = torch.empty(ids.shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
    with torch.autocast(device.type, enabled=False):
        prepared = _prepared(head, dtype)
        for chunk in _chunks(len(ids), chunks_for(device.type, _free_bytes(device), len(head.weight), dtype)):
            shifted, weights, totals = softmax_weights(_logits(prepared, chunk), temperature)
            if draws is not None:
                ids[chunk, n:] = choose(weights, draws[chunk])
            logprobs[chunk] = shifted.gather(1, ids[chunk]) - totals.log().unsqueeze(1)
    return ids, logprobs


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
        reference: _Head | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        head, temperature = _prepared(HeadInputs(states, weight, bias), options.dtype), options.temperature
        at_least_float32 = torch.promote_types(options.dtype, torch.float32)
        logprobs = torch.empty_like(ids, dtype=at_least_float32)
        divergence, sums = torch.empty(2, len(ids), dtype=at_least_float32, device=ids.device)
        kept: list[Tensor] = []  # weights of softmax, whose totals are `sums`; where code is compiled, logits
        sizes = chunks_for(ids.device.type, _free_bytes(ids.device), len(weight), options.dtype)
        for chunk in _chunks(len(ids), sizes):
            if options.compiled:
                large = _logits(head, chunk)
                found = _compiled(token_sums)(large, ids[chunk], temperature)
                logprobs[chunk], divergence[chunk], sums[chunk] = found
            else:
                log_p, large, sums[chunk] = softmax_weights(_logits(head, chunk), temperature)
                log_total = sums[chunk].log()  # still part of `log_p`, the same in all of a row
                found = log_p.gather(1, ids[chunk].reshape(len(log_p), -1)) - log_total.unsqueeze(1)
                logprobs[chunk] = found.view_as(ids[chunk])
                log_ratio = _less_reference(log_p, reference, chunk, temperature)
                divergence[chunk] = log_ratio.mul_(large).sum(-1) / sums[chunk] - log_total
            if options.keep and chunk.stop * large.shape[1] <= sizes.kept:
                kept.append(large)
        ctx.save_for_backward(states, weight, bias, ids, divergence.detach(), sums, *kept)
        ctx.options, ctx.reference, ctx.sizes = options, reference, sizes
        ctx.set_materialize_grads(False)  # nobody may ask for the entropy's gradient
        return logprobs, divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor | None, d_divergence: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_logprobs is None and d_divergence is None:
            return (None,) * 6
        states, weight, bias, ids, divergence, sums, *kept = ctx.saved_tensors
        all_kept = len(kept) == len(_chunks(len(ids), ctx.sizes))
        head: Any = None if all_kept else _prepared(HeadInputs(states, weight, bias), ctx.options.dtype)
        inputs, factor = states.to(ctx.options.dtype), weight.to(ctx.options.dtype)
        wants_states, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        d_states = torch.empty_like(states) if wants_states else None
        d_weight: Tensor | None = None
        d_bias = torch.zeros_like(bias) if wants_bias else None
        summed_in = torch.promote_types(weight.dtype, torch.float32)
        for i, chunk in enumerate(_chunks(len(ids), ctx.sizes)):
            large = kept[i] if i < len(kept) else _for_backward(head, chunk, ctx.options)
            if ctx.options.compiled:
                of_tokens = [None if x is None else x[chunk] for x in (d_logprobs, d_divergence)]
                sums_of = divergence[chunk], sums[chunk]
                d_logits = _compiled(token_sums_gradient)(large, ids[chunk], sums_of, *of_tokens, *ctx.options[:2])
            else:
                d_logits = _d_logits(ctx, large, chunk, d_logprobs, d_divergence)
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=d_bias.dtype)
            d_logits = d_logits.to(ctx.options.dtype)
            if d_states is not None:
                d_states[chunk] = d_logits @ factor
            if wants_weight:
                d_weight = add_product(d_weight, d_logits.T, inputs[chunk], summed_in)
        d_weight = torch.zeros_like(weight) if wants_weight and d_weight is None else d_weight  # no tokens
        return d_states, None if d_weight is None else d_weight.to(weight.dtype), d_bias, None, None, None


def _d_logits(
    ctx: Any, weights: Tensor, chunk: slice, d_logprobs: Tensor | None, d_divergence: Tensor | None
) -> Tensor:
    """Gradient of a chunk's logits, (n, V)."""
    ids, divergence, totals = (x[chunk] for x in ctx.saved_tensors[3:6])
    divergence, totals = divergence[:, None], totals[:, None]
    each = None if d_logprobs is None else d_logprobs[chunk].reshape(len(weights), -1)
    per_weight = None if each is None else each.sum(1, keepdim=True)
    temperature = ctx.options.temperature
    if d_divergence is None:
        assert per_weight is not None
        gradient: Tensor = weights * (per_weight / (-temperature * totals))
    else:
        # a probability of 0 takes its log out of the gradient, if only that log is no infinity once weighted
        log_p = weights.log().sub_(totals.log()).clamp_(min=-1e4)
        gradient = _less_reference(log_p, ctx.reference, chunk, temperature).sub_(divergence)
        gradient *= d_divergence[chunk, None]
        gradient = (gradient if per_weight is None else gradient.sub_(per_weight)).mul_(weights)
        gradient /= temperature * totals
    if each is not None:
        gradient.scatter_add_(1, ids.reshape(len(weights), -1), each / temperature)
    return gradient


def _prepared(head: HeadInputs, dtype: torch.dtype) -> _Head:
    weight = for_products(head.weight, dtype)
    return _Head(HeadInputs(head.states.to(weight.dtype), weight, head.bias), dtype)


def _chunks(n: int, sizes: Chunks) -> Sequence[slice]:
    """Runs of tokens whose logits are worked on together."""
    return [slice(start, min(start + sizes.tokens, n)) for start in range(0, n, sizes.tokens)]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _for_backward(head: _Head, chunk: slice, options: _Options) -> Tensor:
    """What was not kept, once more."""
    logits = _logits(head, chunk)
    return logits if options.compiled else softmax_weights(logits, options.temperature)[1]


def _logits(head: _Head, chunk: slice) -> Tensor:
    """Logits of a chunk, (n, V), at least float32."""
    states, weight, bias = head.inputs
    return float32_linear(states[chunk], weight, bias, head.dtype)


def _less_reference(log_p: Tensor, reference: _Head | None, chunk: slice, temperature: float) -> Tensor:
    """``log p - log q``, in place."""
    if reference is None:
        return log_p
    log_q, _, totals = softmax_weights(_logits(reference, chunk), temperature)
    return log_p.sub_(log_q).add_(totals.log().unsqueeze(1))
