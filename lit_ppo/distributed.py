"""The few collectives there are: everything else reads as if there were one process."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def n_ranks() -> int:
    """Processes that train together, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_shares(share: Callable[[], T]) -> list[T]:
    """Run ``share`` on every rank and hand all results to all ranks, in rank order.

    An exception on one rank stops all of them with that rank's message, so that nobody waits in vain.

    Args:
        share: This rank's part of the work; its result must be picklable where there is more than one rank.

    Raises:
        RuntimeError: Another rank's share failed.
    """
    if n_ranks() == 1:
        return [share()]
    result: T | None = None
    failure: Exception | None = None
    try:
        result = share()
    except Exception as error:
        failure = error
    everyone: list[Any] = [None] * n_ranks()
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    try:
        dist.all_gather_object(everyone, (message, result))
    except RuntimeError as error:
        if failure is not None:
            raise failure from None
        raise RuntimeError(
            f"rank {rank()} waited in vain for the other ranks; one of them has ended, or hangs for longer than the "
            f"process group's timeout; its own output says more ({str(error).splitlines()[0][:200]})"
        ) from error
    if failure is not None:
        raise failure
    for number, (message, _) in enumerate(everyone):
        if message is not None:
            raise RuntimeError(f"rank {number} failed: {message}")
    return [entry for _, entry in everyone]


def sum_over_ranks(values: dict[str, Tensor], alike: dict[str, Tensor] | None = None) -> dict[str, float]:
    """Sum scalars over ranks, in one collective and one synchronisation with the device.

    Args:
        values: Scalars under the same names on every rank.
        alike: Scalars that are the same on every rank: not summed, brought to the host on the same way.
    """
    names, others = sorted(values), alike or {}
    scalars = [*(values[name] for name in names), *others.values()]
    if not scalars:
        return {}
    device = next((x.device for x in scalars if x.device.type != "cpu"), torch.device("cpu"))
    precise = torch.float32 if device.type == "mps" else torch.float64
    stacked = torch.stack([x.detach().to(device, precise) for x in scalars])
    if n_ranks() > 1 and names:
        summed = stacked[: len(names)].to(_collective_device())
        dist.all_reduce(summed)
        stacked[: len(names)] = summed.to(device)
    return dict(zip([*names, *others], stacked.tolist(), strict=True))


def greatest(value: int) -> int:
    """The greatest of all ranks' values; collective."""
    if n_ranks() == 1:
        return value
    values = torch.tensor([value], device=_collective_device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return int(values)


def _collective_device() -> torch.device:
    """NCCL reduces on the GPU only."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
