"""Rows packed end to end: no layer works on padding, save attention, which sees the rows side by side."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_ppo.device import exact_products
from lit_ppo.models.positions import UNBOUNDED, rope_bound, row_groups

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
AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class RealTokens:
    """The N real tokens among (B, L), one row after another, wherever the padding was.

    Masks on the host spare a GPU a synchronisation; what is for the models lies with the ids.
    """

    ids: Tensor  # (N,)
    positions: Tensor  # (N,), each one's place in its row
    number: Tensor  # (B, L), on the mask's device: each real token's number
    packing: Packing

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor) -> "RealTokens":
        """Leave the padding out."""
        device = input_ids.device
        rows, columns = attention_mask.nonzero(as_tuple=True)
        lengths = attention_mask.sum(1, keepdim=True)
        steps = torch.arange(int(lengths.max()), device=attention_mask.device)
        real = steps < lengths
        places = (lengths.cumsum(0) - lengths + steps).masked_fill(~real, 0)
        return cls(
            ids=input_ids[rows.to(device), columns.to(device)],
            positions=steps.expand(real.shape)[real].to(device),
            number=(attention_mask.flatten().cumsum(0) - 1).view(attention_mask.shape),
            packing=Packing(places.to(device), real.flatten().nonzero().squeeze(1).to(device)),
        )

    def packed(self) -> dict[str, Any]:
        """What a backbone reads, as one row of N tokens."""
        return {
            "input_ids": self.ids.unsqueeze(0),
            "position_ids": self.positions.unsqueeze(0),
            # four dimensions say that the mask is ready: transformers then makes none of N x N
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.ids.device),
            "packing": self.packing,
        }

    def side_by_side(self) -> dict[str, Any]:
        """What a backbone reads whose attention takes no packing: (B, longest), padded on the right."""
        places = self.packing.places
        mask = torch.zeros(places.numel(), dtype=torch.long, device=places.device)
        return {
            "input_ids": self.ids[places],
            "attention_mask": mask.index_fill(0, self.packing.taken, 1).view_as(places),
        }


def read_tokens(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of the real tokens.

    Args:
        backbone: Hugging Face model that returns ``last_hidden_state``.
        input_ids: Token ids.
        attention_mask: True at real tokens; positions are counted over these.

    Shapes:
        (B, L), (B, L) -> (N, H), and (B, L) with each real token's number, on the mask's device.
    """
    if backbone in UNBOUNDED or rope_bound(backbone) is None or not len(input_ids):
        return _read(backbone, input_ids, attention_mask)
    number = (attention_mask.flatten().cumsum(0) - 1).view(attention_mask.shape)
    groups = row_groups(backbone, attention_mask.sum(1).tolist())
    states = torch.cat([_read(backbone, input_ids[rows], attention_mask[rows])[0] for rows in groups])
    found = torch.cat([number[rows][attention_mask[rows].bool()] for rows in groups])
    return states[found.argsort().to(states.device)], number


def _read(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    tokens = RealTokens.of(input_ids, attention_mask)
    if getattr(backbone.config, "_attn_implementation", None) == NAME:
        states: Tensor = backbone(**tokens.packed(), use_cache=False).last_hidden_state[0]
    else:
        padded: Tensor = backbone(**tokens.side_by_side(), use_cache=False).last_hidden_state
        states = padded.flatten(0, 1)[tokens.packing.taken]
    return states, tokens.number


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


@contextmanager
def stock_attention(model: PreTrainedModel) -> Iterator[None]:
    """Sample without packing: inside this the model attends as it does outside of this package."""
    before = model.config._attn_implementation
    if before == NAME:
        model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _takes_packing(model: PreTrainedModel) -> bool:
    parameters = inspect.signature(model.base_model.forward).parameters
    takes_arguments = "position_ids" in parameters and any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    return takes_arguments and _hands_on_its_window(model)


def _hands_on_its_window(model: PreTrainedModel) -> bool:
    """Whether attention is full, or tells its window; a few tokens would not show one that only the mask knows."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        slides = getattr(config, "sliding_window", None) is not None
    else:
        if set(kinds) - {"full_attention", "sliding_attention"}:
            return False
        slides = "sliding_attention" in kinds
    return not slides or any(hasattr(module, "sliding_window") for module in model.modules())


def _packs_faithfully(model: PreTrainedModel) -> bool:
    """Compare two rows packed with each of them alone."""
    backbone, device = model.base_model, model.device
    ids = torch.arange(6, device=device).view(2, 3) % model.config.get_text_config().vocab_size
    mask = torch.tensor([[False, True, True], [True, True, True]], device=device)
    with torch.no_grad(), exact_products():
        try:
            packed, _ = read_tokens(backbone, ids, mask)
        except (TypeError, RuntimeError):  # a family that hands nothing on to its attention
            return False
        alone = [
            backbone(input_ids=row.unsqueeze(0), use_cache=False).last_hidden_state[0] for row in (ids[0, 1:], ids[1])
        ]
    tolerance = 1e-4 if packed.dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(packed.float(), torch.cat(alone).float(), rtol=tolerance, atol=tolerance)
