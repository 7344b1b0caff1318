"""Deal rows to ranks, and gather the results.

All collectives of rollouts and updates are here. The rest of the code reads as if there were one process.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lit_ppo.device import has_float64
from lit_ppo.experience import Experience, ModelInputs, rows_or_stand_in
from lit_ppo.shown import reason

T = TypeVar("T")
Plan = list[list[list[int]]]  # rank -> micro-batch -> rows


def n_ranks() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def deal(
    lengths: Sequence[int],
    n_ranks: int,
    *,
    micro_batch_size: int | None = None,
    micro_batch_tokens: int | None = None,
) -> Plan:
    """Deal rows so that ranks get about as many tokens each and rows of similar length share a micro-batch.

    Every rank computes the same plan. Every rank gets the same number of micro-batches, some of them empty, because
    sharded models must run the same number of forwards on all ranks.

    Args:
        lengths: Tokens of each row.
        n_ranks: Ranks to deal to.
        micro_batch_size: Most rows in a micro-batch.
        micro_batch_tokens: Most tokens in a micro-batch, padding included; a longer row gets its own micro-batch.

    >>> deal([5, 1, 3, 2, 4], 2, micro_batch_size=2)
    [[[0, 3], [1]], [[4, 2], []]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])  # equal lengths stay in order
    # ranks take turns in the order 0 1 1 0 0 1 ..., so that no rank always gets the longer row of a pair
    shares = [[row for i, row in enumerate(longest_first) if _rank(i, n_ranks) == rank] for rank in range(n_ranks)]
    if micro_batch_tokens is None:
        size = micro_batch_size or max(len(lengths), 1)
        plan = [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]
    else:
        plan = [list(_within(micro_batch_tokens, share, lengths)) for share in shares]
    count = max(len(micro_batches) for micro_batches in plan)
    return [micro_batches + [[] for _ in range(count - len(micro_batches))] for micro_batches in plan]


def _rank(position: int, n_ranks: int) -> int:
    lap, place = divmod(position, n_ranks)
    return place if lap % 2 == 0 else n_ranks - 1 - place


def _within(budget: int, share: Sequence[int], lengths: Sequence[int]) -> Iterable[list[int]]:
    """Cut rows, longest first, into micro-batches whose padded size is within the budget."""
    micro_batch: list[int] = []
    for row in share:
        if micro_batch and (len(micro_batch) + 1) * lengths[micro_batch[0]] > budget:
            yield micro_batch
            micro_batch = []
        micro_batch.append(row)
    if micro_batch:
        yield micro_batch


def map_rows(
    lengths: Sequence[int], function: Callable[[list[int]], T], **limits: int | None
) -> list[tuple[list[int], T]]:
    """Deal rows to ranks, run ``function`` on each micro-batch of this rank, and hand all results to all ranks.

    Args:
        lengths: Tokens of each row.
        function: From row numbers, which are empty for an empty micro-batch, to a picklable result.
        **limits: ``micro_batch_size`` or ``micro_batch_tokens``, as for :func:`deal`.

    Returns:
        Rows and result of each micro-batch of all ranks.

    Raises:
        RuntimeError: Another rank's share failed.
    """
    plan = deal(lengths, n_ranks(), **limits)
    shares = gather_shares(lambda: [function(rows) for rows in plan[rank()]])
    return [pair for rows, results in zip(plan, shares, strict=True) for pair in zip(rows, results, strict=True)]


def map_forwards(
    function: Callable[[ModelInputs, Sequence[int]], dict[str, Tensor]],
    experience: Experience,
    lengths: list[int],
    limits: dict[str, int | None],
) -> dict[str, Tensor]:
    """Run a function on the micro-batches of this rank and put the rows of all ranks together, (B, T, ...) each.

    The numbers never leave GPUs that can talk to each other.

    Args:
        function: From the inputs of a micro-batch and its rows to tensors (b, t, ...) with t up to T, under the same
            names; rows are followed by zeros.
        experience: All rows.
        lengths: Tokens of each row.
        limits: As for :func:`deal`.

    Raises:
        RuntimeError: Another rank's share failed.
    """
    plan = deal(lengths, n_ranks(), **limits)
    like = experience.response_ids
    mine: dict[str, Tensor] = {}

    def run() -> None:
        for rows in plan[rank()]:
            for name, value in function(experience.micro_batch(rows), rows_or_stand_in(rows)).items():
                value = value.float() if value.is_floating_point() else value
                empty = value.new_zeros(*like.shape, *value.shape[2:])
                mine.setdefault(name, empty)[rows, : value.shape[1]] = value[: len(rows)]

    gather_shares(run)  # a rank that has failed sends nothing
    if n_ranks() == 1 or not mine:
        return mine
    shares = [[row for rows in micro_batches for row in rows] for micro_batches in plan]
    for name in sorted(mine):
        own = mine[name].to(_collective_device())
        block = own.new_zeros(max(map(len, shares)), *own.shape[1:])  # as many rows on every rank
        block[: len(shares[rank()])] = own[shares[rank()]]
        everyone = [torch.empty_like(block) for _ in shares]
        dist.all_gather(everyone, block)
        for rows, values in zip(shares, everyone, strict=True):
            own[rows] = values[: len(rows)]
        mine[name] = own.to(like.device)
    return mine


def my_micro_batches(lengths: Sequence[int], **limits: int | None) -> list[list[int]]:
    """The rows of this rank's micro-batches; arguments as for :func:`deal`."""
    return deal(lengths, n_ranks(), **limits)[rank()]


def gather_shares(share: Callable[[], T]) -> list[T]:
    """Run ``share`` on every rank and return the results of all ranks, in rank order.

    If it raises on one rank, the other ranks raise an error with that rank's message instead of waiting.

    Args:
        share: This rank's part of the work. With more than one rank, its result must be picklable.

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
    message = None if failure is None else reason(failure, 2000)
    try:
        dist.all_gather_object(everyone, (message, result))
    except RuntimeError as error:
        if failure is not None:
            raise failure from None
        raise RuntimeError(
            f"rank {rank()} got no answer from the other ranks: one of them has exited, or hangs for longer than the "
            f"process group's timeout; see that rank's own output"
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
    """Sum scalars over ranks, with one collective and one transfer from the device.

    Args:
        values: Scalars under the same names on every rank.
        least: As ``values``, but the smallest over ranks is returned instead of the sum.
        greatest: As ``values``, but the largest over ranks is returned instead of the sum.
        alike: Scalars that are equal on all ranks. They are not summed, only transferred with the others.
    """
    kinds = [dict(sorted((kind or {}).items())) for kind in (values, least, greatest)]
    named = {name: x for kind in (*kinds, alike or {}) for name, x in kind.items()}
    if not named:
        return {}
    device = next((x.device for x in named.values() if x.device.type != "cpu"), torch.device("cpu"))
    precise = torch.float64 if has_float64(device.type) else torch.float32
    stacked = torch.stack([x.detach().to(device, precise) for x in named.values()])
    sizes = [len(kind) for kind in kinds]
    if n_ranks() > 1 and any(sizes):
        mine = stacked[: sum(sizes)].to(_collective_device())
        everyone = [torch.empty_like(mine) for _ in range(n_ranks())]
        dist.all_gather(everyone, mine)
        sums, minima, maxima = torch.stack(everyone).split(sizes, dim=1)
        stacked[: sum(sizes)] = torch.cat([sums.sum(0), minima.amin(0), maxima.amax(0)]).to(device)
    return dict(zip(named, stacked.tolist(), strict=True))


def my_rows(lengths: Sequence[int], ranks_per_copy: int = 1) -> list[int]:
    """The rows of this rank, where some ranks share a copy of a model and get the same rows.

    Args:
        lengths: Tokens of each row.
        ranks_per_copy: Ranks that share a copy.
    """
    copies = max(n_ranks() // ranks_per_copy, 1)
    return deal(lengths, copies)[rank() // ranks_per_copy % copies][0]


def greatest(value: int) -> int:
    """The largest value over all ranks. Collective."""
    if n_ranks() == 1:
        return value
    values = torch.tensor([value], device=_collective_device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return int(values)


def _collective_device() -> torch.device:
    """NCCL communicates between GPUs only."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
