"""A language-model head that returns float32 sums, for a loss that reads logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_ppo.device import autocast_dtype
from lit_ppo.functional import float32_linear, for_products


class _Float32Linear(torch.autograd.Function):
    """A linear layer of numbers rounded to 16 bits, whose output is sums in float32; gradients are in 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        return float32_linear(x, for_products(weight, dtype), bias, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        d_bias = d_output.sum(0).to(weight.dtype) if wants_bias else None
        d_output = d_output.to(ctx.dtype)
        d_x = (d_output @ weight.to(ctx.dtype)).to(x.dtype) if wants_x else None
        d_weight = (d_output.T @ x.to(ctx.dtype)).to(weight.dtype) if wants_weight else None
        return d_x, d_weight, d_bias, None


def use_float32_logits(model: Any) -> None:
    """Let the head of a causal LM return float32 sums where it multiplies 16-bit numbers, under autocast or not.

    Args:
        model: Hugging Face causal LM, not sharded yet; a head of another kind than ``nn.Linear`` stays as it is.
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        vars(head)["forward"] = partial(_float32_logits, head, head.forward)


def _float32_logits(head: nn.Linear, forward: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    dtype = autocast_dtype(states.device.type) or head.weight.dtype
    if dtype.itemsize >= 4:
        return forward(states)
    inputs = states.flatten(0, -2), head.weight, head.bias, dtype
    logits: Tensor = _Float32Linear.apply(*inputs)  # type: ignore[no-untyped-call]
    unflattened: Tensor = logits.unflatten(0, states.shape[:-1])
    return unflattened
