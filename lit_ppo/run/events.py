"""What TensorBoard must be told again when a run goes on: readers drop the checkpoint's own step and all behind it."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]

EVERY_START = ("_hparams_/", "custom_scalars__config__")  # a run that goes on writes these anew


def events_before(folder: Path, step: int, time: float) -> list[Event]:
    """What a run had told of a step, or of later ones, by a time; what it took back until then is left out.

    Args:
        folder: Of the event files.
        step: The first of the steps.
        time: Seconds since the epoch.
    """
    events: dict[tuple[Any, ...], Event] = {}  # a start that came to nothing leaves copies, with the times of the first
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.wall_time > time:
                continue
            if event.session_log.status == SessionLog.START:
                events = {key: earlier for key, earlier in events.items() if earlier.step < event.step}
            elif event.HasField("summary") and event.step >= step:
                events[event.step, event.wall_time, tuple(value.tag for value in event.summary.value)] = event
    return list(events.values())


def tell_again(logger: TensorBoardLogger, step: int, time: float, but: Collection[str]) -> None:
    """Copy what a checkpoint covers into the file that the run goes on with.

    Histograms, pictures and texts of a checkpoint's own step are written before it is, and no later part of the run has
    them.

    Args:
        logger: Of the run, with ``purge_step=step``.
        step: From which on readers drop what was there.
        time: When the checkpoint was made.
        but: Tags that are told otherwise.
    """
    told = events_before(Path(logger.log_dir), step, time)
    for event in told:
        tags = {value.tag for value in event.summary.value}  # one, but for what many writers bring together
        if not any(tag.startswith(EVERY_START) for tag in tags) and not (event.step == step and tags & {*but}):
            logger.experiment.file_writer.add_event(event, event.step, event.wall_time)
