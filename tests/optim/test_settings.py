"""Adam steps in one kernel on GPUs, unless the user has chosen how; its states have room before they exist."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lit_ppo.optim import settings
from lit_ppo.optim.settings import move_steps, use_fused


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU, which has fused kernels too, counts as a GPU."""
    monkeypatch.setattr(settings, "FUSED_ON", ("cpu",))


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(6.0).view(2, 3)), nn.Parameter(torch.ones(3))]


def is_fused(make: Any) -> list[Any]:
    optimizer = make(weights())
    use_fused(optimizer)
    return [group.get("fused") for group in optimizer.param_groups]


def test_only_adams_without_a_choice_become_fused(on_gpu: None) -> None:
    assert is_fused(lambda p: torch.optim.AdamW(p, lr=0.1)) == [True]
    assert is_fused(lambda p: torch.optim.Adam([{"params": p[:1]}, {"params": p[1:], "lr": 0.1}])) == [True, True]
    assert is_fused(lambda p: torch.optim.AdamW(p, fused=False)) == [False]
    assert is_fused(lambda p: torch.optim.AdamW(p, foreach=True)) == [None]
    assert is_fused(lambda p: torch.optim.AdamW(p, foreach=False)) == [None]
    assert is_fused(lambda p: torch.optim.SGD(p, lr=0.1)) == [None]
    assert is_fused(lambda p: torch.optim.Adamax(p)) == [None]


def test_on_a_cpu_nothing_changes() -> None:
    assert is_fused(lambda p: torch.optim.AdamW(p)) == [None]


def test_fused_steps_are_adams_also_behind_states_of_another(on_gpu: None) -> None:
    """Two steps; the fused one takes over after the first, from a checkpoint whose step is a plain number."""

    def step(optimizer: Any) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = parameter.detach().cos()
        optimizer.step()

    expected = torch.optim.AdamW(weights(), lr=0.1)
    step(expected)
    found = torch.optim.AdamW(weights(), lr=0.1)
    found.load_state_dict(copy.deepcopy(expected.state_dict()))
    for ours, theirs in zip(found.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True):
        ours.data.copy_(theirs)
        found.state[ours]["step"] = float(found.state[ours]["step"])
    use_fused(found)
    move_steps(found)
    step(expected)
    step(found)
    for ours, theirs in zip(found.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
