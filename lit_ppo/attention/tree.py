"""Other tokens behind packed rows: one forward reads what follows from each."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from lit_ppo.attention.autocast import attends_in_float32
from lit_ppo.functional import end_to_end, side_by_side

NAME = "lit_ppo_tree"
TOLERANCE = 0.05  # of the norm of a state: bfloat16 rounds to under 0.01, other tokens or positions give about 1


@dataclass(frozen=True)
class Tree:
    """Where the N tokens of some rows, packed one row after another, and the M other tokens behind them lie.

    Each token attends to the tokens of its row that are before its position, and to itself.
    """

    keys: tuple[Tensor, int, int]  # of the N, see :func:`side_by_side`
    queries: tuple[Tensor, int, int]  # of all: behind each row come its other tokens
    positions: Tensor  # (rows, widest) of the queries

    @classmethod
    def of(
        cls, taken: Tensor, positions: Tensor, n_rows: int, longest: int, rows: Tensor, other_positions: Tensor
    ) -> "Tree":
        """The tree of some rows.

        Args:
            taken: The number of each of the N tokens in the flattened (n_rows, longest).
            positions: Of the N tokens.
            n_rows: Number of rows.
            longest: Tokens of the longest row.
            rows: Of the M other tokens, in order.
            other_positions: Of the M other tokens.
        """
        counts = torch.bincount(rows, minlength=n_rows)
        widest = longest + int(counts.max())
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        queries = torch.cat([taken // longest * widest + taken % longest, rows * widest + longest + place])
        all_positions = positions.new_zeros(n_rows * widest)
        all_positions = all_positions.index_copy(0, queries, torch.cat([positions, other_positions]))
        return cls((taken, n_rows, longest), (queries, n_rows, widest), all_positions.view(n_rows, widest))


def others(actions: Tensor, wanted: Tensor, positions: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The M different tokens among the wanted ones at each place, row by row.

    Args:
        actions: n other tokens in place of each of the last T tokens of a row.
        wanted: Which of them to read, K in all.
        positions: Of the real tokens.
        number: Each real token's number.

    Returns:
        Their ids, positions and rows, and for each of the wanted ones which it is.

    Shapes:
        (B, T, n), (B, T, n), (N,), (B, L) -> (M,), (M,), (M,), (K,).

    >>> actions, both = torch.tensor([[[7, 7], [8, 9]]]), torch.ones(1, 2, 2, dtype=torch.bool)
    >>> others(actions, both, torch.arange(3), torch.arange(3)[None])
    (tensor([7, 8, 9]), tensor([1, 2, 2]), tensor([0, 0, 0]), tensor([0, 0, 1, 2]))
    """
    device, t = actions.device, actions.shape[1]
    places = torch.arange(wanted[..., 0].numel(), device=device).view(*wanted.shape[:2], 1).expand(wanted.shape)
    codes = (places * 2**32 + actions)[wanted.to(device)]
    codes, back = codes.unique(return_inverse=True)
    places, ids = codes // 2**32, codes % 2**32
    replaced = number[:, -t:].to(device).flatten()[places]
    return ids, positions[replaced], places // t, back


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Tree,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a tree: of each token with its row and with itself. Two other tokens never meet.

    Args:
        module: The layer.
        query: As in transformers.
        key: As in transformers.
        value: As in transformers.
        attention_mask: Not used.
        tree: Where the tokens lie.
        scaling: Of the scores.
        sliding_window: Tokens that a token sees; None: all before it.
        softcap: Limit of the scores.
        s_aux: Scores of sinks, one a head.
        **kwargs: Further arguments of attention in transformers.

    Shapes:
        query (1, heads, N + M, d), key and value (1, kv_heads, N + M, d) -> (1, N + M, heads, d).
    """
    dtype, n, longest = query.dtype, len(tree.keys[0]), tree.keys[2]
    in_float32 = attends_in_float32(query.device)
    with torch.autocast("cpu", enabled=False) if in_float32 else nullcontext():
        if in_float32:
            query, key, value = query.float(), key.float(), value.float()
        groups = query.shape[1] // key.shape[1]
        precise = torch.promote_types(query.dtype, torch.float32)
        own = _product_with_own(query.to(precise), key, groups).sum(-1, keepdim=True)
        query, own = (side_by_side(x, *tree.queries) for x in (query, own))
        keys, values = (side_by_side(x[:, :, :n], *tree.keys, ascending=True) for x in (key, value))
        keys, values = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (keys, values))
        scores = torch.cat([(query @ keys.mT).to(precise), own], dim=-1) * (scaling or query.shape[-1] ** -0.5)
        scores = scores if softcap is None else (scores / softcap).tanh() * softcap
        places, positions = torch.arange(longest, device=scores.device), tree.positions[..., None]
        seen = places < positions
        if sliding_window is not None:
            seen &= places > positions - sliding_window
        scores = scores.masked_fill(~pad(seen, (0, 1), value=True)[:, None], -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
        weights = scores.softmax(-1).to(value.dtype)
        read, own = weights[..., :longest] @ values, weights[..., longest : longest + 1]
        read, own = (end_to_end(x.transpose(1, 2), tree.queries[0]) for x in (read, own))
        read = read + _product_with_own(own.transpose(1, 2), value, groups).transpose(1, 2)
    return read.to(dtype), None


def _product_with_own(x: Tensor, own: Tensor, groups: int) -> Tensor:
    """What each head has times what its group of heads shares; (1, heads, N, -), (1, kv_heads, N, d)."""
    product: Tensor = x.unflatten(1, (-1, groups)) * own.unsqueeze(2)
    return product.flatten(1, 2)


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def read(backbone: Any, inputs: dict[str, Any]) -> Tensor:
    """Hidden states of all tokens of a tree, (N + M, H).

    Raises:
        ValueError: The model takes no tree.
    """
    before = backbone.config._attn_implementation
    backbone.config._attn_implementation = NAME
    try:
        states: Tensor = backbone(**inputs, use_cache=False).last_hidden_state[0]
    except (TypeError, ValueError) as error:  # a family that hands nothing on to its attention
        raise unreadable(backbone, str(error)) from error
    finally:
        backbone.config._attn_implementation = before
    return states


def check(backbone: Any, inputs: dict[str, Any], n: int, states: Tensor) -> None:
    """Check the last state that was read from a tree.

    Args:
        backbone: Attends as it does to plain rows.
        inputs: What it made the states of.
        n: Tokens that are not other tokens.
        states: The states, (N + M, H).

    Raises:
        ValueError: The model does not read a tree as it reads plain rows.
    """
    tree, ids = inputs["tree"], inputs["input_ids"][0]
    row = int(tree.queries[0][-1]) // tree.queries[2]
    position = int(inputs["position_ids"][0, -1])
    plain_ids = ids[:n][tree.keys[0] // tree.keys[2] == row].clone()
    plain_ids[position] = ids[-1]  # what comes behind it keeps the row's length, on which RoPE may depend
    output = backbone(input_ids=plain_ids[None], attention_mask=torch.ones_like(plain_ids)[None], use_cache=False)
    plain = output.last_hidden_state[0, position]
    error = (states[-1] - plain).float().norm() / plain.float().norm()
    if not error <= TOLERANCE:
        raise unreadable(backbone, f"error {float(error):.2g}")


def unreadable(backbone: Any, problem: str) -> ValueError:
    """The error of a model that does not read a tree, and what to do."""
    return ValueError(
        f"CounterfactualActions or AdvantageRegression: {type(backbone).__name__} does not read other tokens behind a "
        f"row as in their place ({problem}); remove the callback, or use another critic, such as Llama, Qwen, Gemma or "
        "GPT-2"
    )
