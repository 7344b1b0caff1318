"""Deal rows to ranks and micro-batches: a plan that every rank computes alike."""

from collections.abc import Iterable, Sequence

Plan = list[list[list[int]]]  # rank -> micro-batch -> rows


def deal(
    lengths: Sequence[int],
    n_ranks: int,
    *,
    micro_batch_size: int | None = None,
    micro_batch_tokens: int | None = None,
) -> Plan:
    """Deal rows so that ranks have about as many tokens each, and rows of like length share a micro-batch.

    Every rank gets the same number of micro-batches, empty ones included: sharded models must run as many
    forwards on each.

    Args:
        lengths: Tokens of each row.
        n_ranks: Ranks to deal to.
        micro_batch_size: Most rows in a micro-batch.
        micro_batch_tokens: Most tokens in a micro-batch, padding included; a longer row stands alone.

    >>> deal([5, 1, 3, 2, 4], 2, micro_batch_size=2)
    [[[0, 3], [1]], [[4, 2], []]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])  # of one length: in their order
    # there and back again (0 1 1 0 0 1 ...), so that no rank always gets the longer row of a pair
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
    """Cut rows, longest first, into runs whose padded size keeps to the budget."""
    run: list[int] = []
    for row in share:
        if run and (len(run) + 1) * lengths[run[0]] > budget:
            yield run
            run = []
        run.append(row)
    if run:
        yield run
