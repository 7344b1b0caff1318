"""The language-model head on target tokens only, in chunks: no (B, T, V) tensor ever exists."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

CHUNK_ELEMENTS = 2**23  # logits worked on at a time: 32 MiB in float32
KEPT_ELEMENTS = 2**25  # probabilities kept for the backward, 128 MiB; beyond that, logits are computed again


class HeadInputs(NamedTuple):
    """A model's states at the N target tokens and the head that turns them into logits."""

    states: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)


def token_statistics(
    head: HeadInputs, ids: Tensor, temperature: float = 1.0, kl_to: HeadInputs | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and the entropy of its distribution or the exact KL to another model's.

    Both are differentiable, once. Under autocast the products are taken in its dtype, all else in float32.

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
        for chunk in _chunks(head):
            log_p = _log_softmax(head, chunk, temperature)
            p = log_p.exp()
            logprobs[chunk] = log_p.gather(1, ids[chunk, None]).squeeze(1)
            divergence[chunk] = _dot(p, _log_ratio(log_p, reference, chunk, temperature))
            if keep and chunk.stop * p.shape[1] <= KEPT_ELEMENTS:
                kept.append(p)
        ctx.save_for_backward(states, weight, bias, ids, divergence, *kept)
        ctx.temperature, ctx.dtype, ctx.reference = temperature, dtype, reference
        ctx.set_materialize_grads(False)  # nobody may ask for the entropy's gradient
        return logprobs, divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor | None, d_divergence: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_logprobs is None and d_divergence is None:
            return (None,) * 8
        states, weight, bias, ids, divergence, *kept = ctx.saved_tensors
        head = _cast(states, weight, bias, ctx.dtype)
        wants_states, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        d_states = torch.empty_like(states) if wants_states else None
        d_weight: Tensor | None = None
        d_bias = torch.zeros_like(bias) if wants_bias else None
        for i, chunk in enumerate(_chunks(head)):
            p = kept[i] if i < len(kept) else _log_softmax(head, chunk, ctx.temperature).exp_()
            d_logits = _d_logits(ctx, p, chunk, ids, divergence, d_logprobs, d_divergence)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(ctx.dtype)
            if d_states is not None:
                d_states[chunk] = d_logits @ head.weight
            if wants_weight:
                d_weight = _add_product(d_weight, d_logits.T, head.states[chunk], weight.dtype)
        if wants_weight and d_weight is None:  # no tokens
            d_weight = torch.zeros_like(weight)
        return d_states, d_weight, d_bias, None, None, None, None, None


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


def _chunks(head: HeadInputs) -> Sequence[slice]:
    """Runs of tokens whose logits are worked on together."""
    size = max(1, CHUNK_ELEMENTS // len(head.weight))
    n = len(head.states)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _log_softmax(head: HeadInputs, chunk: slice, temperature: float) -> Tensor:
    """Log-probabilities of a chunk, (n, V), at least float32."""
    logits = linear(head.states[chunk], head.weight, head.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _finite(torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1))


def _finite(log_p: Tensor) -> Tensor:
    """Without -inf, which times 0 would be NaN: a token that cannot occur adds nothing."""
    return log_p.clamp_(min=torch.finfo(log_p.dtype).min)


def _log_ratio(log_p: Tensor, reference: HeadInputs | None, chunk: slice, temperature: float) -> Tensor:
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
