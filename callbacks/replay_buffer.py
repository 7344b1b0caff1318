"""Rows of earlier updates, for callbacks that learn from them again."""

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_ppo.functional import join_rows, select_rows


class ReplayBuffer:
    """Keeps in host memory what the last updates had for each row, and adds some of it to a minibatch.

    Args:
        updates: How many updates it remembers.
    """

    def __init__(self, updates: int) -> None:
        self._kept: deque[dict[str, Any]] = deque(maxlen=updates)
        self._draws = 0  # so far: they number the random numbers

    def add(self, experience: Any) -> None:
        """Remember all rows of an experience."""
        rows = _on_host(_rows(_fields(experience), len(experience.response_mask)))
        if hasattr(experience, "lengths"):
            rows["lengths"] = list(experience.lengths)
        self._kept.append(rows)

    def extend(self, minibatch: Any, n: int, seed: int) -> None:
        """Add up to ``n`` of the rows to a minibatch, in place: different ones, each as likely as any other.

        Args:
            minibatch: No model has read it yet.
            n: Rows to add.
            seed: Of the draw, with the number of draws before it.

        Raises:
            ValueError: The minibatch has a value for each row that earlier rows lack.
        """
        sizes = [len(kept["response_mask"]) for kept in self._kept]
        drawn = np.random.default_rng([seed, self._draws]).permutation(sum(sizes))[:n]
        self._draws += 1
        for kept, size, start in zip(self._kept, sizes, np.cumsum([0, *sizes]).tolist(), strict=False):
            listed = [int(row) - start for row in drawn if start <= row < start + size]
            if listed:
                _join(minibatch, select_rows(kept, torch.tensor(listed), listed, size))
        if hasattr(minibatch, "weigh"):
            minibatch.weigh()

    def state_dict(self) -> dict[str, Any]:
        """Tensors as bytes: lists of numbers would be slow to save."""
        return {"updates": [_packed(kept) for kept in self._kept], "draws": self._draws}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what :meth:`state_dict` returned."""
        self._kept.clear()
        self._kept.extend(_unpacked(kept) for kept in state_dict["updates"])
        self._draws = state_dict["draws"]


def _join(minibatch: Any, rows: dict[str, Any]) -> None:
    """Add rows to all that the minibatch has for each row."""
    fields = _fields(minibatch)
    own = _rows(fields, len(minibatch.response_mask))
    if hasattr(minibatch, "weigh"):
        own.pop("weights", None)  # made anew
    for name, value in own.items():
        known: Any = rows.get(name, {} if isinstance(value, dict) else None)
        lacks = [f"{name}[{key!r}]" for key in value if key not in known] if isinstance(value, dict) else []
        if known is None or lacks:
            raise ValueError(
                f"AdvantageRegression adds responses of earlier updates, which lack {', '.join(lacks) or name}; set it "
                "in every update, or use replay=0"
            )
        joined = join_rows(fields[name], known, left_padded=name.startswith("prompt_"))
        setattr(minibatch, name, joined)


def _fields(rows: Any) -> dict[str, Any]:
    """The fields of an experience or a minibatch that are set."""
    names = getattr(rows.__class__, "__dataclass_fields__", None) or vars(rows)
    return {name: getattr(rows, name) for name in names if hasattr(rows, name)}


def _rows(fields: dict[str, Any], n: int) -> dict[str, Any]:
    """Of some fields, those with one entry for each of ``n`` rows, without the graphs of tensors."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            found[name] = _rows(value, n)
        elif isinstance(value, Tensor) and value.ndim and len(value) == n:
            found[name] = value.detach()
        elif isinstance(value, list) and len(value) == n:
            found[name] = value
    return found


def _on_host(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_host(entry) for name, entry in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


def _packed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _packed(entry) for name, entry in value.items()}
    if isinstance(value, Tensor):
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return {"tensor": data, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    return value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"tensor", "dtype", "shape"}:
        data = torch.frombuffer(bytearray(value["tensor"] or b"\0"), dtype=torch.uint8)[: len(value["tensor"])]
        return data.view(getattr(torch, value["dtype"])).view(value["shape"])
    return {name: _unpacked(entry) for name, entry in value.items()} if isinstance(value, dict) else value
