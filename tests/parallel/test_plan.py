"""Every row is dealt once, every rank runs as many forwards, budgets hold."""

import itertools
import random

import pytest

from lit_ppo.parallel.ranks import deal

RANDOM = random.Random(0)
LENGTHS = [RANDOM.randint(2, 40) for _ in range(23)]


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("budget", [{"micro_batch_size": 4}, {"micro_batch_tokens": 60}, {}])
def test_each_row_is_dealt_once_and_ranks_run_as_many_forwards(n_ranks, budget):
    plan = deal(LENGTHS, n_ranks, **budget)
    dealt = [row for micro_batches in plan for rows in micro_batches for row in rows]
    assert sorted(dealt) == list(range(len(LENGTHS)))
    assert len(plan) == n_ranks
    assert len({len(micro_batches) for micro_batches in plan}) == 1


def test_a_micro_batch_keeps_to_its_size():
    sizes = [[len(rows) for rows in share] for share in deal(LENGTHS, 2, micro_batch_size=4)]
    assert sizes == [[4, 4, 3], [4, 4, 4]]


def test_a_micro_batch_keeps_to_its_tokens_padding_included():
    for rows in itertools.chain(*deal(LENGTHS, 2, micro_batch_tokens=60)):
        assert len(rows) <= 1 or len(rows) * max(LENGTHS[row] for row in rows) <= 60
    assert max(len(rows) for rows in deal(LENGTHS, 1, micro_batch_tokens=60)[0]) > 1


def test_a_row_beyond_the_token_budget_stands_alone():
    assert deal([100, 2, 2], 1, micro_batch_tokens=10) == [[[0], [1, 2]]]


def test_ranks_get_about_as_many_tokens():
    plan = deal(LENGTHS, 2, micro_batch_size=4)
    tokens = [sum(LENGTHS[row] for rows in share for row in rows) for share in plan]
    assert max(tokens) - min(tokens) <= max(LENGTHS)


def test_fewer_rows_than_ranks_leave_empty_micro_batches():
    assert deal([7], 3, micro_batch_size=2) == [[[0]], [[]], [[]]]


def test_padding_counts_to_the_longest_row():
    assert deal([4, 10], 1, micro_batch_tokens=19) == [[[1], [0]]]
    assert deal([4, 10], 1, micro_batch_tokens=20) == [[[1, 0]]]
