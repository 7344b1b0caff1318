"""What an optimizer keeps for each trained weight, found by one step of it on small tensors."""

from collections.abc import Iterable
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_ppo.memory.shapes import local_shape
from lit_ppo.shown import first_line

PRIMES = (131, 137, 5, 7, 3)  # sizes of the probe's dimensions, by which they are found again in the states' shapes

Shape = tuple[int, ...]


class StateSizes:
    """Bytes of the optimizer states of weights of any shape.

    Args:
        make: From parameters to optimizer, as a module has it.
    """

    def __init__(self, make: Any) -> None:
        self._make = make
        self._probed = cache(self._probe)
        self.name = ""
        self.keys: list[str] = []

    def n_bytes(self, tensors: Iterable[Tensor], n_shards: int = 1) -> int:
        """Bytes of the states that the first of several processes keeps for its shards.

        Args:
            tensors: Trained weights; only their shapes and dtypes are read.
            n_shards: Processes that the weights are divided over.
        """
        total = 0
        for tensor in tensors:
            shape = local_shape(tensor, n_shards)
            size = dict(zip(PRIMES, shape, strict=False))
            states = self._probed(len(shape), tensor.dtype)
            total += sum(prod(size.get(n, n) for n in state) * item for state, item in states)
        return total

    def _probe(self, n_dimensions: int, dtype: torch.dtype) -> list[tuple[Shape, int]]:
        """Shape and bytes per element of each state."""
        weight = nn.Parameter(torch.ones(PRIMES[:n_dimensions], dtype=dtype))
        weight.grad = torch.ones_like(weight)
        optimizer: Optimizer = self._make([weight])
        self.name = type(optimizer).__name__
        optimizer.step()
        states = {k: x for k, x in optimizer.state[weight].items() if isinstance(x, Tensor)}
        self.keys = [key for key, state in states.items() if state.ndim] or self.keys
        return [(tuple(state.shape), state.element_size()) for state in states.values()]


def describe(sizes: StateSizes) -> str:
    """What is kept, in words."""
    return f"{sizes.name} keeps {', '.join(sizes.keys) or 'nothing'}"


def check_probe(argument: str, sizes: StateSizes, tensors: Iterable[Tensor]) -> None:
    """Raise what the optimizer says to weights of these numbers of dimensions.

    Raises:
        ValueError: Names the argument.
    """
    try:
        sizes.n_bytes(tensors)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{argument}): one step of it on small weights fails, so its states cannot be counted "
            f"({first_line(error)}); correct its arguments"
        ) from error
