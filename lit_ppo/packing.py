"""Rows packed end to end: no layer works on padding, save attention, which sees the rows side by side."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lit_ppo_packed_sdpa"


@dataclass(frozen=True)
class Packing:
    """Where the N real tokens of b rows, packed one row after another, lie among the rows padded on the right."""

    places: Tensor  # (b, L), the packed number of each token; 0 at padding
    taken: Tensor  # (N,), the number of each packed token in the flattened (b, L)

    def pad(self, x: Tensor) -> Tensor:
        """(1, heads, N, d) -> (b, heads, L, d)."""
        _, heads, n, d = x.shape
        rows = x.transpose(1, 2).reshape(n, heads * d)[self.places.flatten()]
        return rows.view(*self.places.shape, heads, d).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """(b, L, heads, d) -> (1, N, heads, d)."""
        return x.flatten(0, 1)[self.taken].unsqueeze(0)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of packed rows, each by itself; without ``packing`` the stock one."""
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = packing.pad(query), packing.pad(key), packing.pad(value)
    length = query.shape[2]
    near = None  # padding comes after all real tokens, which causal attention never looks at: no mask is needed
    if sliding_window is not None and sliding_window < length:
        steps = torch.arange(length, device=query.device)
        ago = steps.unsqueeze(1) - steps
        near = ((ago >= 0) & (ago < sliding_window))[None, None]
    output, _ = sdpa_attention_forward(module, query, key, value, near, **kwargs)
    return packing.unpad(output), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for sampling, which is not packed


def pack(input_ids: Tensor, attention_mask: Tensor) -> tuple[dict[str, Any], Tensor]:
    """What a backbone reads of rows whose padding is left out, wherever it was.

    Args:
        input_ids: Token ids.
        attention_mask: True at real tokens; on the host it spares a GPU a synchronisation.

    Returns:
        Its arguments, and the packed number of each token, (B, L).

    Shapes:
        input_ids, attention_mask (B, L); N real tokens.
    """
    device = input_ids.device
    lengths = attention_mask.sum(1, keepdim=True)
    number = (attention_mask.flatten().cumsum(0) - 1).view(attention_mask.shape)
    positions = attention_mask.cumsum(1) - 1
    steps = torch.arange(int(lengths.max()), device=attention_mask.device)
    real = steps < lengths
    places = (lengths.cumsum(0) - lengths + steps).masked_fill(~real, 0)
    rows, columns = attention_mask.nonzero(as_tuple=True)
    packing = Packing(places.to(device), real.flatten().nonzero().squeeze(1).to(device))
    arguments = {
        "input_ids": input_ids[rows.to(device), columns.to(device)].unsqueeze(0),
        "position_ids": positions[attention_mask].unsqueeze(0).to(device),
        # four dimensions say that the mask is ready: transformers then makes none of N x N
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "packing": packing,
    }
    return arguments, number


def use_packing(model: PreTrainedModel) -> None:
    """Let a model that attends through SDPA read packed rows, if it then gives what it gives for each row alone.

    Args:
        model: In eval mode.
    """
    if model.config._attn_implementation != "sdpa" or not _takes_packing(model):
        return
    model.set_attn_implementation(NAME)
    if not _packs_faithfully(model):
        model.set_attn_implementation("sdpa")


def reads_packed(backbone: nn.Module) -> bool:
    """Whether :func:`use_packing` has found that it can."""
    return getattr(backbone.config, "_attn_implementation", None) == NAME


def _takes_packing(model: PreTrainedModel) -> bool:
    parameters = inspect.signature(model.base_model.forward).parameters
    return "position_ids" in parameters and any(p.kind == p.VAR_KEYWORD for p in parameters.values())


def _packs_faithfully(model: PreTrainedModel) -> bool:
    """Compare two rows packed with each of them alone."""
    backbone, device = model.base_model, model.device
    rows = torch.arange(7, device=device).unsqueeze(0) % model.get_input_embeddings().num_embeddings
    mask = torch.tensor([[False, True, True], [True, True, True]], device=device)
    with torch.no_grad():
        arguments, _ = pack(torch.cat([rows[:, :3], rows[:, 3:6]]), mask)
        try:
            packed = backbone(**arguments, use_cache=False).last_hidden_state[0]
        except (TypeError, RuntimeError):  # a family that hands on no arguments to its attention
            return False
        alone = [backbone(input_ids=row, use_cache=False).last_hidden_state[0] for row in (rows[:, 1:3], rows[:, 3:6])]
    tolerance = 1e-4 if packed.dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(packed.float(), torch.cat(alone).float(), rtol=tolerance, atol=tolerance)
