"""Rows with other tokens behind them: one forward reads what follows from each."""

from typing import Any

import torch
from torch import Tensor

TOLERANCE = 0.05  # of the norm of a state: bfloat16 rounds to under 0.01, other tokens or positions give about 1


def tree(input_ids: Tensor, attention_mask: Tensor, actions: Tensor, *, added: bool) -> dict[str, Tensor]:
    """Inputs of a model that reads other tokens in place of the last ones, each behind the same tokens before it.

    Behind each row come its other tokens. Each attends to the tokens before the one that it replaces, and to itself,
    and has its position.

    Args:
        input_ids: Token ids.
        attention_mask: True at real tokens; positions are counted over these.
        actions: n other tokens for each of the last T tokens.
        added: The model adds its mask to the scores; otherwise True is where it attends.

    Shapes:
        (B, L), (B, L), (B, T, n) -> input_ids and position_ids (B, L + T n), attention_mask (B, 1, L + T n, L + T n).

    >>> ids, ones = torch.tensor([[4, 5, 6]]), torch.ones(1, 3)
    >>> inputs = tree(ids, ones, torch.tensor([[[7], [8]]]), added=False)
    >>> inputs["input_ids"].tolist(), inputs["position_ids"].tolist()
    ([[4, 5, 6, 7, 8]], [[0, 1, 2, 1, 2]])
    >>> inputs["attention_mask"][0, 0, 3:].int()  # of 7, in place of 5, and of 8, in place of 6
    tensor([[1, 0, 0, 1, 0],
            [1, 1, 0, 0, 1]], dtype=torch.int32)
    """
    (length, (t, n)), device = (input_ids.shape[1], actions.shape[1:]), input_ids.device
    real, before = attention_mask.bool().to(device, non_blocking=True), length - t
    places = torch.arange(t, device=device).repeat_interleave(n)
    branches = torch.arange(length, device=device) < before + places[:, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = torch.cat([causal, branches])[None] & real[:, None]
    mask = torch.nn.functional.pad(mask, (0, t * n)) | torch.eye(length + t * n, dtype=torch.bool, device=device)
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    scores = torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)
    return {
        "input_ids": torch.cat([input_ids, actions.flatten(1)], dim=1),
        "position_ids": torch.cat([positions, positions[:, before:].repeat_interleave(n, 1)], dim=1),
        "attention_mask": (scores if added else mask)[:, None],
    }


def check_branch(model: Any, input_ids: Tensor, attention_mask: Tensor, actions: Tensor, states: Tensor) -> None:
    """Check one state that was read from a tree: the first row's, behind its last real token but one.

    Args:
        model: Returns ``last_hidden_state``.
        input_ids: Those of the tree.
        attention_mask: Those of the tree.
        actions: Those of the tree.
        states: What the model made of the tree.

    Shapes:
        (B, L), (B, L), (B, T, n), (B, T, n, H).

    Raises:
        ValueError: The model does not read a tree as it reads plain rows.
    """
    real, t = attention_mask[0].bool(), actions.shape[1]
    place = max(0, int(real[-t:].sum()) - 1)
    before = input_ids[0, : len(real) - t + place][real[: len(real) - t + place].to(input_ids.device)]
    plain = model(input_ids=torch.cat([before, actions[0, place, :1]])[None], use_cache=False).last_hidden_state[0, -1]
    error = (states[0, place, 0] - plain).float().norm() / plain.float().norm()
    if not error <= TOLERANCE:
        raise ValueError(
            f"CounterfactualActions: {type(model).__name__} does not read other tokens behind a row as in their place "
            f"(error {float(error):.2g}): it takes no attention mask of four dimensions, or no positions; "
            "remove the callback, or use another critic"
        )
