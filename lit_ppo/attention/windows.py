"""Windows of sliding attention: those of a configuration, and those that a model's attention is told."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from lit_ppo.functional import no_mask

NAME = "lit_ppo_windows"


def layers_of(config: Any) -> Sequence[Any]:
    """Configurations of the layers where these differ in size, as Gemma 4's do; else the one of all."""
    text = config.get_text_config()
    layers: Sequence[Any] = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    return layers


def windows(config: Any) -> list[int | None]:
    """How many tokens a token sees in each layer; None: all before it. Empty where no layer has a window."""
    text, layers = config.get_text_config(), layers_of(config)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    found = [
        getattr(layers[i % len(layers)], "sliding_window", None) if kind == "sliding_attention" else None
        for i, kind in enumerate(kinds)
    ]
    return [] if found == [None] * len(found) else found


def tells_its_windows(model: PreTrainedModel) -> bool:
    """Whether each layer tells its attention its window; some leave it to the mask, which packed rows do without.

    Qwen2-MoE is one of these. What it would read of a few tokens does not show it: they are fewer than the window.
    """
    expected = windows(model.config)
    if not expected:
        return True
    told: list[int | None] = []
    zero = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    inputs = {"input_ids": zero, "position_ids": zero, "attention_mask": no_mask(zero.device), "told": told}
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        with torch.no_grad():
            model.base_model(**inputs, use_cache=False)
    except (TypeError, ValueError, RuntimeError):  # a family that hands nothing on to its attention
        return False
    finally:
        model.config._attn_implementation = before
    return told == expected


def _noting_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    told: list[int | None],
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    told.append(sliding_window)
    return query.new_zeros(*query.shape[:3], value.shape[-1]).transpose(1, 2), None


AttentionInterface.register(NAME, _noting_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
