"""TensorBoard events of a checkpoint's own step: a resumed run copies them, because readers drop the originals."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

EVERY_START = ("_hparams_/", "custom_scalars__config__")  # tags that every start writes again


def copy_events(logger: TensorBoardLogger, step: int, time: float, skip: Collection[str]) -> None:
    """Copy the events that a checkpoint covers into the event file of the resumed run.

    Histograms, figures and texts of a step are written before its checkpoint. The resumed run does not write them
    again, and ``purge_step`` hides the originals.

    Args:
        logger: The resumed run's, with ``purge_step=step``.
        step: First step whose events readers drop.
        time: When the checkpoint was made, in seconds since the epoch.
        skip: Tags that are logged at ``step`` in another way.
    """
    for event in covered_events(Path(logger.log_dir), step, time):
        tags = {value.tag for value in event.summary.value}
        if not any(tag.startswith(EVERY_START) for tag in tags) and not (event.step == step and tags & {*skip}):
            logger.experiment.file_writer.add_event(event, event.step, event.wall_time)


def covered_events(folder: Path, step: int, time: float) -> list[Event]:
    """Events of ``step`` and later that were written up to a time, without those that were purged by then.

    Args:
        folder: Of the event files.
        step: The first step.
        time: In seconds since the epoch.
    """
    events: dict[tuple[Any, ...], Event] = {}  # by what is equal in copies that an earlier, failed resume made
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.wall_time > time:
                continue
            if event.session_log.status == SessionLog.START:
                events = {key: earlier for key, earlier in events.items() if earlier.step < event.step}
            elif event.HasField("summary") and event.step >= step:
                events[event.step, event.wall_time, tuple(value.tag for value in event.summary.value)] = event
    return list(events.values())
