"""Dealing rows to ranks, and summing over ranks; the second rank is simulated."""

import itertools
import random
from typing import Any

import pytest
import torch

from lit_ppo.parallel import ranks
from lit_ppo.parallel.ranks import deal, sum_over_ranks

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
    assert deal([4, 10], 1, micro_batch_tokens=19) == [[[1], [0]]]
    assert deal([4, 10], 1, micro_batch_tokens=20) == [[[1, 0]]]
    assert deal([100, 2, 2], 1, micro_batch_tokens=10) == [[[0], [1, 2]]], "a longer row has its own micro-batch"


def test_ranks_get_about_as_many_tokens():
    plan = deal(LENGTHS, 2, micro_batch_size=4)
    tokens = [sum(LENGTHS[row] for rows in share for row in rows) for share in plan]
    assert max(tokens) - min(tokens) <= max(LENGTHS)


def test_fewer_rows_than_ranks_leave_empty_micro_batches():
    assert deal([7], 3, micro_batch_size=2) == [[[0]], [[]], [[]]]


def test_sums_come_back_under_their_names():
    values = {"b": torch.tensor(2.0), "a": torch.tensor(1.0, dtype=torch.float64)}
    assert sum_over_ranks(values, alike={"norm": torch.tensor(3.0)}) == {"a": 1.0, "b": 2.0, "norm": 3.0}
    extremes = {"least": {"low": torch.tensor(-1.5)}, "greatest": {"high": torch.tensor(7.0)}}
    assert sum_over_ranks(values, **extremes) == {"a": 1.0, "b": 2.0, "low": -1.5, "high": 7.0}
    assert sum_over_ranks({}) == {}
    assert sum_over_ranks({}, alike={"norm": torch.tensor(0.5)}) == {"norm": 0.5}


def test_values_come_from_the_device_in_one_transfer(monkeypatch):
    transfers = []
    tolist, item = torch.Tensor.tolist, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(1) or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: transfers.append(1) or item(self))
    sum_over_ranks({str(i): torch.tensor(float(i)) for i in range(5)}, alike={"norm": torch.tensor(1.0)})
    assert len(transfers) == 1


def test_two_ranks_sum_and_compare_in_one_collective(monkeypatch):
    """1 + 10, the lesser of 2 and -3, the greater of 4 and -5; values that are equal on all ranks are not sent."""
    sent: list[Any] = []

    def gather(everyone: list[Any], mine: Any) -> None:
        sent.append(mine.tolist())
        everyone[:] = [mine, torch.tensor([10.0, -3.0, -5.0], dtype=torch.float64)]

    monkeypatch.setattr(ranks, "n_ranks", lambda: 2)
    monkeypatch.setattr(ranks.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(ranks.dist, "all_gather", gather)
    found = sum_over_ranks(
        {"sum": torch.tensor(1.0)},
        least={"low": torch.tensor(2.0)},
        greatest={"high": torch.tensor(4.0)},
        alike={"norm": torch.tensor(0.5)},
    )
    assert found == {"sum": 11.0, "low": -3.0, "high": 4.0, "norm": 0.5}
    assert sent == [[1.0, 2.0, 4.0]]
