"""The weights of an actor as a checkpoint would hold them, one after another."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


@torch.no_grad()
def checkpoint_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and full tensors of a Hugging Face model, tied weights once, an adapter added to its weights.

    At any time one full tensor exists beside the model. Where the model is sharded each step is collective, so all
    ranks must take all of them.

    Args:
        model: Full, sharded (FSDP2), or with an adapter (LoRA).
    """
    layers: list[Any] = [part for part in model.modules() if hasattr(part, "lora_A")]
    adapted = {id(layer.base_layer.weight): layer for layer in layers}
    buffers = {name for name, _ in model.named_buffers()}
    persistent = [(name, x) for name, x in model.state_dict(keep_vars=True).items() if name in buffers]
    for name, tensor in [*model.named_parameters(), *persistent]:
        if ".lora_" in name:
            continue
        full = _full(tensor)
        if id(tensor) in adapted:
            full = full + _delta(adapted[id(tensor)]).to(full.dtype)
        yield from revert_weight_conversion(model, {name.replace(".base_layer.", "."): full}).items()


@torch.no_grad()
def adapter_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names, as peft saves them, and full tensors of an adapter alone; collective where it is sharded.

    Args:
        model: With an adapter (LoRA).
    """
    for name, tensor in model.named_parameters():
        if ".lora_" in name:
            yield f"base_model.model.{name.replace('.default', '')}", _full(tensor)


def _full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _delta(layer: Any) -> Tensor:
    """What the adapter of a layer adds to its weight."""
    [name] = layer.lora_A
    delta: Tensor = _full(layer.lora_B[name].weight) @ _full(layer.lora_A[name].weight) * layer.scaling[name]
    return delta.T if layer.fan_in_fan_out else delta


def weights_key(model: PreTrainedModel) -> int:
    """A number that changes when a weight is changed in place, other than by a fused optimizer."""
    return sum(parameter._version for parameter in model.parameters())
