"""A cache of keys and values that is allocated once: steps write into it, and read views of it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_ppo.device import autocast_dtype

GROUPED_SDPA = "lit_ppo_grouped_sdpa"


class LayerBuffer(StaticLayer):
    """Keys and values of one layer. Layers with a sliding window keep all tokens: their mask hides the older ones.

    transformers' own static layers cannot drop rows, and those with a sliding window move their content for every
    token.

    Args:
        filled: The layer after the prompts.
        rows: For each row of the buffer, its row in ``filled``.
        length: Tokens that fit.
        n_prompt: Tokens of the prompts, with padding.
        position: Where the next token is written, a tensor that all layers share.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, filled: DynamicLayer, rows: Tensor, length: int, n_prompt: int, position: Tensor) -> None:
        super().__init__(max_cache_len=length)
        self.is_sliding = bool(filled.is_sliding)
        self.is_initialized = True
        self.position = position
        self.all_keys = _expanded(filled.keys, rows, length, n_prompt)
        self.all_values = _expanded(filled.values, rows, length, n_prompt)
        filled.keys = filled.values = None  # so that never more than one layer is held twice
        self.show(len(rows), length)

    def show(self, n: int, length: int) -> None:
        """Let the next steps read the first rows and tokens only."""
        self.keys, self.values = self.all_keys[:n, :, :length], self.all_values[:n, :, :length]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows over others."""
        for everything in (self.all_keys, self.all_values):
            everything[target] = everything[source]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.position, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.position, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        return self.position.squeeze(0)


def _expanded(filled: Any, rows: Tensor, length: int, n_prompt: int) -> Tensor:
    """Zeros behind the prompts: NaN there would reach the result, though the mask hides it."""
    _, heads, kept, size = filled.shape
    buffer: Tensor = filled.new_zeros(len(rows), heads, length, size, dtype=_products(filled))
    buffer[:, :, n_prompt - kept : n_prompt] = filled[rows]
    return buffer


def _products(x: Any) -> torch.dtype:
    """The dtype in which attention takes products: autocast would cast the whole cache to it for every token."""
    dtype: torch.dtype = x.dtype
    return autocast_dtype(x.device.type) or dtype if dtype == torch.float32 else dtype


class Buffers(Cache):
    """The buffers of all layers, filled from the cache of the prompts, whose layers are emptied.

    Args:
        filled: After the prompts.
        rows: See :class:`LayerBuffer`.
        length: See :class:`LayerBuffer`.
        n_prompt: See :class:`LayerBuffer`.
    """

    layers: list[Any]

    def __init__(self, filled: Cache, rows: Tensor, length: int, n_prompt: int) -> None:
        self.position = torch.full((1,), n_prompt, device=rows.device)
        filled_layers: list[Any] = filled.layers
        super().__init__([LayerBuffer(layer, rows, length, n_prompt, self.position) for layer in filled_layers])

    def show(self, n: int, length: int) -> None:
        """See :class:`LayerBuffer`."""
        for layer in self.layers:
            layer.show(n, length)

    def move(self, source: Tensor, target: Tensor) -> None:
        """See :class:`LayerBuffer`."""
        for layer in self.layers:
            layer.move(source, target)


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of one token a row in which heads that share keys read them once.

    transformers repeats the keys for each head where there is a mask: seven times the cache in Qwen2.5-0.5B.
    """
    n, heads, n_queries, size = query.shape
    groups = key.shape[1]
    if n_queries > 1 or groups == heads or any(kwargs.get(name) is not None for name in ("position_bias", "softcap")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.shape[1] > 1:  # one for each head
        attention_mask = attention_mask.reshape(n, groups, heads // groups, -1)
    output = scaled_dot_product_attention(
        query.reshape(n, groups, heads // groups, size), key, value, attention_mask, scale=kwargs.get("scaling")
    )
    return output.reshape(n, 1, heads, value.shape[-1]), None


def additive_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """What is added to attention's logits, made once for all layers: each would make it of a boolean mask."""
    seen = sdpa_mask(*args, dtype=dtype, **kwargs)
    if seen is None:
        return None
    dtype = autocast_dtype(seen.device.type) or dtype
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


AttentionInterface.register(GROUPED_SDPA, grouped_attention)
AttentionMaskInterface.register(GROUPED_SDPA, additive_mask)
