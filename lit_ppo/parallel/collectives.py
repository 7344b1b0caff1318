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


def sum_over_ranks(
    values: dict[str, Tensor],
    *,
    least: dict[str, Tensor] | None = None,
    greatest: dict[str, Tensor] | None = None,
    alike: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """Sum scalars over ranks, in one collective and one synchronisation with the device.

    Args:
        values: Scalars under the same names on every rank.
        least: The same, of which the least over ranks comes back.
        greatest: The same, of which the greatest does.
        alike: Scalars that are the same on every rank: not summed, brought to the host on the same way.
    """
    kinds = [dict(sorted((kind or {}).items())) for kind in (values, least, greatest)]
    named = {name: x for kind in (*kinds, alike or {}) for name, x in kind.items()}
    if not named:
        return {}
    device = next((x.device for x in named.values() if x.device.type != "cpu"), torch.device("cpu"))
    precise = torch.float32 if device.type == "mps" else torch.float64
    stacked = torch.stack([x.detach().to(device, precise) for x in named.values()])
    sizes = [len(kind) for kind in kinds]
    if n_ranks() > 1 and any(sizes):
        mine = stacked[: sum(sizes)].to(_collective_device())
        everyone = [torch.empty_like(mine) for _ in range(n_ranks())]
        dist.all_gather(everyone, mine)
        sums, minima, maxima = torch.stack(everyone).split(sizes, dim=1)
        stacked[: sum(sizes)] = torch.cat([sums.sum(0), minima.amin(0), maxima.amax(0)]).to(device)
    return dict(zip(named, stacked.tolist(), strict=True))


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
