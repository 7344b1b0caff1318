"""Scores that are tensors and arrays, whatever their kind, as plain tensors."""

import inspect
from collections.abc import Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_ppo.shown import shown

ONE_EACH = "expected is a sequence with one number a response"
NOT_ASYNC = "rewards are called without an event loop; give a plain function that returns asyncio.run(...)"


def no_sequence(scores: Any, source: str) -> TypeError:
    """The error of scores that are no sequence.

    Args:
        scores: What was returned; a coroutine is closed, since nobody awaits it.
        source: Who gave it.
    """
    if inspect.iscoroutine(scores):
        scores.close()
    is_async = inspect.isawaitable(scores) or hasattr(scores, "__aiter__")
    order = ", which has no order" if isinstance(scores, Set) else ""
    advice = NOT_ASYNC if is_async else ONE_EACH
    return TypeError(f"{source}: returned {type(scores).__name__} {shown(scores)}{order}; {advice}")


def dense(values: Tensor, source: str) -> Tensor:
    """A sparse or quantised tensor as a plain one.

    Raises:
        TypeError: It has no values, or not one for a row.
    """
    if values.is_nested or values.is_meta:
        kind = "a nested tensor" if values.is_nested else "a tensor on the meta device, which has no values"
        raise TypeError(f"{source}: returned {kind}; {ONE_EACH}")
    values = values.dequantize() if values.is_quantized else values
    return values if values.layout == torch.strided else values.to_dense()


def as_array(scores: Any) -> Any:
    """The array of an array, a table's column or the like, with the mask where it has one."""
    return scores if isinstance(scores, np.ma.MaskedArray) else np.asarray(scores)


def of_array(values: Any, source: str) -> Tensor:
    """A tensor of an array of numbers.

    Args:
        values: The array.
        source: Who gave it, for the error.

    Raises:
        TypeError: It holds something else.
        ValueError: Values are missing.
    """
    missing = np.ma.getmaskarray(values).reshape(-1)
    if missing.any():
        row = int(missing.argmax())
        raise ValueError(f"{source}: returned a masked value for response {row}; {ONE_EACH}, none missing")
    if values.dtype.kind not in "biufc":
        kind = f"an array that is not numbers (dtype {shown(values.dtype)}, shape {values.shape})"
        raise TypeError(f"{source}: returned {kind}; {ONE_EACH}")
    return torch.from_numpy(np.array(values, dtype=np.complex128 if values.dtype.kind == "c" else np.float64))
