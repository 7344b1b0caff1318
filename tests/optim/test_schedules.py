"""The warm-up and cosine schedule against its formula, worked by hand."""

import math

import pytest
import torch

from lit_ppo.optim.schedules import WarmupCosine


def rates(steps: int, lr: float = 1.0, **kwargs: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = WarmupCosine(optimizer, **kwargs)  # type: ignore[arg-type]
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_follows_the_curve_and_stays_at_its_end() -> None:
    """Peak 2, warm-up 4: 0.5, 1, 1.5, 2; then in 4 steps a cosine at 0, 45, 90, 135, 180 degrees, down to 20%."""
    half = math.sqrt(0.5)
    cosine = [0.4 + 0.8 * (1 + c) for c in (1, half, 0, -half, -1)]
    expected = [0.5, 1.0, 1.5, 2.0, *cosine, 0.4, 0.4]
    assert rates(11, lr=2.0, warmup_steps=4, final_fraction=0.2, total_steps=8) == pytest.approx(expected)


def test_without_warmup_the_peak_comes_first() -> None:
    assert rates(3, total_steps=2) == pytest.approx([1.0, 0.5, 0.0])


def test_resumed_schedule_goes_on() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = WarmupCosine(optimizer, warmup_steps=2, total_steps=10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    state, optimizer_state = scheduler.state_dict(), optimizer.state_dict()
    resumed_optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    resumed = WarmupCosine(resumed_optimizer, warmup_steps=2)
    resumed_optimizer.load_state_dict(optimizer_state)
    resumed.load_state_dict(state)
    for one, other in ((optimizer, scheduler), (resumed_optimizer, resumed)):
        one.step()
        other.step()
    expected = 0.5 * (1 + math.cos(math.pi * 4 / 8))
    assert [s.get_last_lr()[0] for s in (scheduler, resumed)] == pytest.approx([expected, expected])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"warmup_steps": -1}, r"warmup_steps=-1\): must be an integer, at least 0"),
        ({"final_fraction": 1.5}, r"final_fraction=1.5\): must be a finite number, at least 0 and at most 1"),
        ({"warmup_steps": 5, "total_steps": 5}, r"total_steps=5\): must be above warmup_steps=5"),
    ],
)
def test_impossible_arguments_are_refused(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"WarmupCosine\(" + message):
        rates(1, **kwargs)


def test_a_run_shorter_than_its_warmup_is_told_so_and_goes_on() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = WarmupCosine(optimizer, warmup_steps=4)
    with pytest.warns(UserWarning, match=r"WarmupCosine\(warmup_steps=4\): the run has only 2 steps"):
        scheduler.set_total_steps(2)
    for rate in (0.25, 0.5, 0.75):
        assert scheduler.get_last_lr() == [rate]
        optimizer.step()
        scheduler.step()


def test_steps_without_a_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"WarmupCosine\(total_steps=None\): nothing has set the length of the run"):
        rates(2)
