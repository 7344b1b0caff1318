"""What the layers of a model keep for the backward, and how to keep less."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_ppo.parallel.sharding import blocks

SHARE = 0.7  # of the free memory that activations may take: the backward and the head need some too


def checkpoint_activations(model: nn.Module) -> None:
    """Keep only the inputs of a model's blocks for the backward, which recomputes the rest.

    transformers' own checkpointing is off in eval mode, and our models are always in eval mode.
    """
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def kept_bytes(forward: Callable[[int], Any], rows: int) -> int:
    """Bytes that a forward of so many rows keeps for its backward, weights aside, from forwards of one and two rows.

    Args:
        forward: Of the first rows of a micro-batch, by their number; its result holds the graph.
        rows: In the micro-batch, all of the same length.
    """
    one = _kept(lambda: forward(1))
    return one if rows == 1 else one + (rows - 1) * (_kept(lambda: forward(2)) - one)


def _kept(forward: Callable[[], Any]) -> int:
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        graph = forward()
        del graph
    return sum(storages.values())


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, with what PyTorch holds and does not use."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached
