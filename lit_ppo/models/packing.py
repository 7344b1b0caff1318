"""Rows packed end to end: no layer works on padding.

Attention reads packed rows by a kernel for rows of any length (:mod:`lit_ppo.attention`). Where there is none, it sees
the rows side by side.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_ppo.attention import autocast, kernels, tree
from lit_ppo.attention.choice import (
    Attention,
    Heads,
    asks_for_sdpa,
    attend,
    mixes,
    packs_faithfully,
    supports_sdpa,
    takes_packing,
)
from lit_ppo.attention.kernels import PLAIN, Kernel
from lit_ppo.functional import end_to_end, no_mask, product_rows, side_by_side, to_device
from lit_ppo.models.positions import UNBOUNDED, rope_bound, row_groups

NAME = "lit_ppo_packed_sdpa"


@dataclass(frozen=True)
class Packing:
    """Where the N packed tokens of some rows, one row after another, lie among the rows padded on the right."""

    taken: Tensor  # (N,), the number of each packed token in the flattened (rows, longest)
    rows: int
    longest: int
    starts: Tensor | None = None  # (rows + 1,), int32, each row's first packed token; for a kernel
    kernel: Kernel | None = None


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
    """Attention of packed rows, each by itself; without ``packing`` the stock one."""
    sdpa = autocast.sdpa if torch.is_autocast_enabled(query.device.type) else sdpa_attention_forward
    if packing is None:
        return sdpa(module, query, key, value, attention_mask, **kwargs)[0], None
    if packing.kernel is not None:
        rows = packing.starts, packing.longest
        output = attend(packing.kernel, module, query, key, value, rows, sliding_window, kwargs)
        if output is not None:
            return output, None
    places = packing.taken, packing.rows, packing.longest
    query, key, value = (side_by_side(x, *places, ascending=True) for x in (query, key, value))
    length = query.shape[2]
    near = None  # padding comes after all real tokens, which causal attention never looks at: no mask is needed
    if sliding_window is not None and sliding_window < length:
        steps = torch.arange(length, device=query.device)
        ago = steps.unsqueeze(1) - steps
        near = ((ago >= 0) & (ago < sliding_window))[None, None]
    return end_to_end(sdpa(module, query, key, value, near, **kwargs)[0], packing.taken, ascending=True), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class RealTokens:
    """The N real tokens among (B, L), one row after another, wherever the padding was.

    If they are filled up, some padding follows the first rows, as tokens that no real token sees.
    Masks on the host spare a GPU a synchronisation; what is for the models lies with the ids.
    """

    ids: Tensor  # (N,)
    positions: Tensor  # (N,), each one's place in its row
    number: Tensor  # (B, L), on the mask's device: each real token's number
    packing: Packing

    @classmethod
    def of(
        cls, input_ids: Tensor, attention_mask: Tensor, kernel: Kernel | None = None, *, fill: bool = False
    ) -> "RealTokens":
        """Leave the padding out.

        Args:
            input_ids: Token ids.
            attention_mask: True at real tokens.
            kernel: Of attention.
            fill: Fill up to the number of tokens that products should have (:func:`product_rows`), as
                far as there is padding.
        """
        device = input_ids.device
        mask = attention_mask.bool().flatten()
        lengths = attention_mask.sum(1, keepdim=True)
        longest = int(lengths.max())
        steps = torch.arange(longest, device=mask.device)
        real = steps < lengths
        where, kept, number = mask.nonzero().squeeze(1), real, mask.cumsum(0) - 1
        wanted = product_rows(len(where), device) if fill else len(where)
        if wanted > len(where):
            kept = (real.flatten() | ((~real).flatten().cumsum(0) <= wanted - len(where))).view(real.shape)
            number = number.masked_scatter(mask, (kept.flatten().cumsum(0) - 1)[real.flatten()])
            where = where.new_zeros(real.shape).masked_scatter(real, where)[kept]
        starts = None
        if kernel is not None:
            starts = to_device(torch.nn.functional.pad(lengths.flatten().cumsum(0), (1, 0)).int(), device)
        return cls(
            ids=input_ids.flatten().index_select(0, to_device(where, device)),
            positions=to_device(steps.expand(real.shape)[kept], device),
            number=number.view(attention_mask.shape),
            packing=Packing(
                to_device(kept.flatten().nonzero().squeeze(1), device), len(lengths), longest, starts, kernel
            ),
        )

    def packed(self) -> dict[str, Any]:
        """What a backbone reads, as one row of N tokens."""
        return {
            "input_ids": self.ids.unsqueeze(0),
            "position_ids": self.positions.unsqueeze(0),
            "attention_mask": no_mask(self.ids.device),
            "packing": self.packing,
        }

    def side_by_side(self) -> dict[str, Any]:
        """What a backbone reads whose attention takes no packing: (rows, longest), padded on the right."""
        shape = self.packing.rows, self.packing.longest
        empty = torch.zeros(shape[0] * shape[1], dtype=torch.long, device=self.ids.device)
        return {
            "input_ids": empty.index_copy(0, self.packing.taken, self.ids).view(shape),
            "attention_mask": empty.index_fill(0, self.packing.taken, 1).view(shape),
        }


def read_tokens(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of the real tokens; some of padding may be among them.

    Args:
        backbone: Hugging Face model that returns ``last_hidden_state``.
        input_ids: Token ids.
        attention_mask: True at real tokens; positions are counted over these.

    Shapes:
        (B, L), (B, L) -> (N, H), and (B, L) with each real token's number, on the mask's device.
    """
    if backbone in UNBOUNDED or rope_bound(backbone) is None or not len(input_ids):
        return _read(backbone, input_ids, attention_mask)
    groups = row_groups(backbone, attention_mask.sum(1).tolist())
    parts = []
    for rows in groups:
        states, number = _read(backbone, input_ids[rows], attention_mask[rows])
        parts.append(states.index_select(0, to_device(number[attention_mask[rows].bool()], states.device)))
    number = (attention_mask.flatten().cumsum(0) - 1).view(attention_mask.shape)
    return _in_order(parts, attention_mask, groups), number


def _in_order(parts: list[Tensor], mask: Tensor, groups: list[list[int]]) -> Tensor:
    """What groups of rows gave, one entry for each True of their mask, in the order of all rows."""
    number = (mask.flatten().cumsum(0) - 1).view(mask.shape)
    found = torch.cat([number[rows][mask[rows].bool()] for rows in groups])
    return torch.cat(parts).index_select(0, to_device(found.argsort(), parts[0].device))


def _read(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    attention: Attention | None = getattr(backbone, "lit_ppo_attention", None)
    kernel = _kernel(attention, backbone, input_ids.device)
    config: Any = backbone.config
    if attention is not None and attention.exact == "eager" and attention.packs:  # only a kernel reads packed rows
        config._attn_implementation = "eager" if kernel is None else NAME
    packs = getattr(config, "_attn_implementation", None) == NAME
    tokens = RealTokens.of(input_ids, attention_mask, kernel, fill=packs and kernel is None)
    if packs:
        states: Tensor = backbone(**tokens.packed(), use_cache=False).last_hidden_state[0]
    else:
        padded: Tensor = backbone(**tokens.side_by_side(), use_cache=False).last_hidden_state
        states = padded.flatten(0, 1).index_select(0, tokens.packing.taken)
    return states, tokens.number


def _kernel(attention: Attention | None, backbone: nn.Module, device: torch.device) -> Kernel | None:
    if attention is None or device.type not in kernels.DEVICES:
        return None
    return attention.kernel(backbone, device)


def use_packing(model: PreTrainedModel) -> None:
    """Let a model read packed rows, if it then gives what it gives for each row alone.

    Args:
        model: In eval mode. It attends through SDPA or, on a GPU, by a kernel of flash attention that the user has
            named; what the latter gives is tried on the device, when it is first used.
    """
    stock = model.config._attn_implementation
    asked = stock if stock is not None and "flash" in stock else None
    if asked is None and (stock != "sdpa" or asks_for_sdpa(model)):
        return
    exact = "sdpa" if asked is None or supports_sdpa(model) else "eager"
    packs = takes_packing(model)
    if packs:
        model.config._attn_implementation = NAME
        kernel = None if exact == "sdpa" else PLAIN
        packs = packs_faithfully(
            model, lambda ids, mask: RealTokens.of(ids, mask, kernel).packed(), alone=None if kernel is None else exact
        )
    model.config._attn_implementation = NAME if packs and exact == "sdpa" else exact
    if asked is not None and not packs:
        rank_zero_info(
            f"attn_implementation={asked!r}: {type(model).__name__} cannot read packed rows; using {exact!r}"
        )
    heads = Heads.of(model.config)
    model.base_model.lit_ppo_attention = Attention(asked, exact, packs, heads)  # type: ignore[assignment]


def read_others(
    backbone: Any, input_ids: Tensor, attention_mask: Tensor, actions: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of the real tokens, and those after other tokens in place of the last T, in one forward.

    Args:
        backbone: Hugging Face model that returns ``last_hidden_state``.
        input_ids: Token ids.
        attention_mask: True at real tokens; positions are counted over these.
        actions: n other tokens in place of each of the last T tokens.
        wanted: Which of them are read, M in all.

    Shapes:
        (B, L), (B, L), (B, T, n), (B, T, n) -> (N, H), (B, L) with each real token's number, and (M, H).

    Raises:
        ValueError: The model does not read them as it reads plain rows.
    """
    if backbone in UNBOUNDED or rope_bound(backbone) is None or not len(input_ids):
        return _read_others(backbone, input_ids, attention_mask, actions, wanted)
    groups = row_groups(backbone, attention_mask.sum(1).tolist())
    tensors = input_ids, attention_mask, actions, wanted
    own, _, read = zip(*(_read_others(backbone, *(x[rows] for x in tensors)) for rows in groups), strict=True)
    number = (attention_mask.flatten().cumsum(0) - 1).view(attention_mask.shape)
    return _in_order([*own], attention_mask, groups), number, _in_order([*read], wanted, groups)


def _read_others(
    backbone: Any, input_ids: Tensor, attention_mask: Tensor, actions: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = RealTokens.of(input_ids, attention_mask)
    ids, positions, rows, back = tree.others(actions, wanted, tokens.positions, tokens.number)
    packed = tokens.packing.taken, tokens.positions, tokens.packing.rows, tokens.packing.longest
    inputs = {
        "input_ids": torch.cat([tokens.ids, ids])[None],
        "position_ids": torch.cat([tokens.positions, positions])[None],
        "attention_mask": no_mask(tokens.ids.device),
        "tree": tree.Tree.of(*packed, rows, positions),
    }
    checked = vars(backbone).get("lit_ppo_reads_trees")
    if not checked and (problem := mixes(backbone)):
        raise tree.unreadable(backbone, problem)
    states = tree.read(backbone, inputs)
    if not checked:
        with stock_attention(backbone):
            tree.check(backbone, inputs, len(tokens.ids), states)
        backbone.lit_ppo_reads_trees = True
    own, read = states.tensor_split([len(tokens.ids)])
    return own, tokens.number, read.index_select(0, back)


@contextmanager
def stock_attention(model: PreTrainedModel) -> Iterator[None]:
    """Sample without packing: inside this the model attends as it does outside of this package."""
    before = model.config._attn_implementation
    attention: Attention | None = getattr(model.base_model, "lit_ppo_attention", None)
    if attention is not None:
        by_kernel = attention.asked is not None and _kernel(attention, model.base_model, model.device) is not None
        exact = autocast.NAME if attention.exact == "sdpa" and _in_float32(model.device) else attention.exact
        model.config._attn_implementation = attention.asked if by_kernel else exact
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _in_float32(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type) and autocast.attends_in_float32(device)
