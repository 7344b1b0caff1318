"""What TensorBoard shows of a run."""

from pathlib import Path

from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder: Path, tag: str = "train/loss") -> dict[int, float]:
    """Step -> value, and a failure if a step was told twice."""
    events = EventAccumulator(str(folder)).Reload().Scalars(tag)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def shown(folder: Path) -> dict[str, list[int]]:
    """The steps of every curve, picture and text as TensorBoard reads them."""
    told = plugin_event_accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    tags = [tag for tag in told.Tags()["tensors"] if not tag.startswith(("_hparams_", "custom_scalars", "epoch"))]
    return {tag: [event.step for event in told.Tensors(tag)] for tag in tags}
