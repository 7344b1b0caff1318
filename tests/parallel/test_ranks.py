"""Sums over ranks on one process: what is alike comes along unsummed, in double precision."""

import pytest
import torch

from lit_ppo.parallel import ranks as distributed
from lit_ppo.parallel.ranks import sum_over_ranks


def test_values_and_what_is_alike_come_back_under_their_names():
    values = {"b": torch.tensor(2.0), "a": torch.tensor(1.0, dtype=torch.float64)}
    assert sum_over_ranks(values, alike={"norm": torch.tensor(3.0)}) == {"a": 1.0, "b": 2.0, "norm": 3.0}
    extremes = {"least": {"low": torch.tensor(-1.5)}, "greatest": {"high": torch.tensor(7.0)}}
    assert sum_over_ranks(values, **extremes) == {"a": 1.0, "b": 2.0, "low": -1.5, "high": 7.0}
    assert sum_over_ranks({}) == {}
    assert sum_over_ranks({}, alike={"norm": torch.tensor(0.5)}) == {"norm": 0.5}


def test_the_device_is_asked_once(monkeypatch):
    asked = []
    tolist, item = torch.Tensor.tolist, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: asked.append(1) or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: asked.append(1) or item(self))
    sum_over_ranks({str(i): torch.tensor(float(i)) for i in range(5)}, alike={"norm": torch.tensor(1.0)})
    assert len(asked) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_may_differ(dtype):
    assert sum_over_ranks({"a": torch.tensor(0.5, dtype=dtype), "b": torch.tensor(0.1)})["a"] == 0.5


def test_two_ranks_sum_and_compare_in_one_collective(monkeypatch):
    """1 + 10, the lesser of 2 and -3, the greater of 4 and -5; what is alike is not sent."""
    sent = []

    def gather(everyone, mine):
        sent.append(mine.tolist())
        everyone[:] = [mine, torch.tensor([10.0, -3.0, -5.0], dtype=mine.dtype)]

    monkeypatch.setattr(distributed, "n_ranks", lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(distributed.dist, "all_gather", gather)
    found = sum_over_ranks(
        {"sum": torch.tensor(1.0)},
        least={"low": torch.tensor(2.0)},
        greatest={"high": torch.tensor(4.0)},
        alike={"norm": torch.tensor(0.5)},
    )
    assert found == {"sum": 11.0, "low": -3.0, "high": 4.0, "norm": 0.5}
    assert sent == [[1.0, 2.0, 4.0]]
