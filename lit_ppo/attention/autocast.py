"""Attention under autocast: a CPU has no fast one in 16 bits for few tokens."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_ppo.attention.choice import asks_for_sdpa
from lit_ppo.device import is_cpu

NAME = "lit_ppo_sdpa"
SHORT = 256
"""Tokens up to which SDPA is faster in float32 on a CPU with bf16 units: 2.3 times at 64 tokens, 0.8 times at 1,024."""


def sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The stock attention through SDPA; under autocast on a CPU in float32, if few tokens or a cache are so.

    Args:
        module: The layer.
        query: As in transformers.
        key: As in transformers.
        value: In float32 if a cache holds it so, see :func:`hold_in_float32`.
        mask: As in transformers.
        **kwargs: Further arguments of attention in transformers.
    """
    if not attends_in_float32(query.device) or (key.shape[2] > SHORT and value.dtype != torch.float32):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    with torch.autocast("cpu", enabled=False):
        query, key, value = query.float(), key.float(), value.float()
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register(NAME, sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use(model: Any) -> Any:
    """Let a model that attends through SDPA do so by :func:`sdpa`, unless its layers need the name ``sdpa``.

    Args:
        model: Hugging Face model; returned.
    """
    if model.config._attn_implementation == "sdpa" and not asks_for_sdpa(model):
        model.config._attn_implementation = NAME
    return model


def attends_in_float32(device: torch.device) -> bool:
    """Whether autocast is on, on a device where attention in float32 can be faster all the same."""
    return is_cpu(device) and torch.is_autocast_enabled("cpu")


def hold_in_float32(cache: Any) -> None:
    """Where attention is in float32, convert a cache once and not for every token; what is appended is promoted."""
    for layer in getattr(cache, "layers", ()):
        grows = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        if grows and layer.is_initialized and attends_in_float32(layer.keys.device):
            layer.keys, layer.values = layer.keys.float(), layer.values.float()
