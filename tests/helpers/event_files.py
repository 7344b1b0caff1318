"""What a run wrote for TensorBoard, read back."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder: Path, tag: str = "train/loss") -> dict[int, float]:
    """Step -> value, and a failure if a step was logged twice."""
    events = EventAccumulator(str(folder)).Reload().Scalars(tag)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All that was logged, times aside; a step events twice is a failure."""
    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(("time/", "throughput/", "memory/", "epoch"))]
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    for tag, points in found.items():
        assert len({step for step, _ in points}) == len(points), tag
    assert "objective/score" in found
    return found


def close(one: dict[str, list[tuple[int, float]]], other: dict[str, list[tuple[int, float]]]) -> None:
    """Same tags, steps and, to rounding, values."""
    assert {tag: [step for step, _ in points] for tag, points in one.items()} == {
        tag: [step for step, _ in points] for tag, points in other.items()
    }
    for tag, points in one.items():
        values = [value for _, value in points]
        assert values == pytest.approx([value for _, value in other[tag]], rel=2e-4, abs=2e-6), tag


def shown(folder: Path) -> dict[str, list[int]]:
    """The steps of every curve, picture and text as TensorBoard reads them."""
    events = plugin_event_accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    tags = [tag for tag in events.Tags()["tensors"] if not tag.startswith(("_hparams_", "custom_scalars", "epoch"))]
    return {tag: [event.step for event in events.Tensors(tag)] for tag in tags}
