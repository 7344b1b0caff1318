"""The largest forwards and backwards of an update, traced on tensors without storage.

Call these functions where tensors have no storage.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_ppo.activations import checkpoint_activations
from lit_ppo.memory.live import Live
from lit_ppo.models.head import HeadInputs, read_logprobs, token_statistics
from lit_ppo.parallel.sharding import blocks


@dataclass(frozen=True)
class UpdateTrace:
    """Bytes of one micro-batch, on top of weights and gradients; together the highest point of the backward."""

    cast: int  # bfloat16 copies of weights, kept for the backward
    activations: int  # kept for the backward by the layers
    head: int  # kept by the head
    workspace: int  # of the backward

    @property
    def peak(self) -> int:
        """All of them."""
        return self.cast + self.activations + self.head + self.workspace


def trace_update(
    model: PreTrainedModel,
    rows: int,
    length: int,
    targets: int,
    autocast: torch.dtype | None,
    *,
    is_critic: bool = False,
    checkpointing: bool = False,
    has_gradients: bool = True,
) -> UpdateTrace:
    """Forward and backward of a micro-batch.

    Args:
        model: The causal LM, or the critic's backbone.
        rows: Responses.
        length: Tokens of prompt and response.
        targets: Tokens of the response.
        autocast: Dtype of the products; None: that of the weights.
        is_critic: A value for each token instead of the head.
        checkpointing: Keep only the inputs of blocks, see :func:`checkpoint_activations`.
        has_gradients: There are some from a micro-batch before; otherwise new ones count as workspace.
    """
    forwards = {block: block.forward for block in blocks(model)}
    if checkpointing:
        checkpoint_activations(model)
    try:
        cast = 0 if autocast is None else _update(model, 1, 2, 1, autocast, is_critic, has_gradients)[0]
        kept, head, peak = _update(model, rows, length, targets, autocast, is_critic, has_gradients)
    finally:
        for block, forward in forwards.items():
            block.forward = forward
    cast = min(cast, kept)
    return UpdateTrace(cast, kept - cast, head, peak - kept - head)


def _update(
    model: Any,
    rows: int,
    length: int,
    targets: int,
    autocast: torch.dtype | None,
    is_critic: bool,
    has_gradients: bool,
) -> tuple[int, int, int]:
    """Bytes after the layers, further ones after the head, and the most in all."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad and has_gradients else None
    ids = torch.zeros(rows, length, dtype=torch.long)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    live = Live([*model.parameters(), *model.buffers(), *gradients, ids])
    with live, torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False):
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -targets - 1 : -1].flatten(0, 1)
        kept = live.now
        values = states.float().mean(-1) if is_critic else _logprobs(model, states)
        head = live.now - kept
        del states
        torch.autograd.backward(values.sum())
    for parameter in model.parameters():
        parameter.grad = None
    return kept, head, live.peak


def trace_scoring(model: Any, rows: int, length: int, targets: int, autocast: torch.dtype | None, kind: str) -> int:
    """The most bytes of a forward without gradients, on top of the weights.

    Args:
        model: The causal LM, the critic's backbone, or the reward model.
        rows: Responses in one forward.
        length: Tokens of prompt and response.
        targets: Tokens of the response.
        autocast: See :func:`trace_update`.
        kind: ``"head"``, ``"critic"`` or ``"classifier"``.
    """
    ids = torch.zeros(rows, length, dtype=torch.long)
    live = Live([*model.parameters(), *model.buffers(), ids])
    cast = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False)
    with torch.no_grad(), live, cast:
        if kind == "classifier":
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        else:
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -targets - 1 : -1]
            if kind == "head":
                states = states.flatten(0, 1)
                read_logprobs(_head(model, states), torch.zeros(len(states), 1, dtype=torch.long))
    return live.peak


def _logprobs(model: Any, states: Tensor) -> Tensor:
    return token_statistics(_head(model, states), torch.zeros(len(states), dtype=torch.long))[0]


def _head(model: Any, states: Tensor) -> HeadInputs:
    head = model.get_output_embeddings()
    return HeadInputs(states, head.weight, head.bias)
