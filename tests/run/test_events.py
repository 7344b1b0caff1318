"""TensorBoard shows every event of a resumed run once."""

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter

from lit_ppo.run.checkpoint import StepCheckpoint
from lit_ppo.run.events import copy_events, covered_events
from tests.helpers.event_files import shown
from tests.helpers.toys import make_data, make_module, make_trainer

NOW = time.time()
SAVED = NOW + 1000.0  # when the checkpoint was made


def write(folder: Path, part: int, start: float | None, *events: tuple[str, int, float]) -> None:
    """One part of a run: the step from which readers drop earlier events; tags with steps and seconds from now.

    A start at half a step comes after the checkpoint.
    """
    with SummaryWriter(folder) as writer:
        if start is not None:
            again = Event(session_log=SessionLog(status=SessionLog.START))
            writer.file_writer.add_event(again, int(start), NOW + 2000 if start % 1 else NOW)
        for tag, step, seconds in events:
            writer.add_scalar(tag, 1.0, step, walltime=NOW + seconds)
    (written,) = folder.glob("events.out.tfevents.1*")
    written.rename(folder / f"events.out.tfevents.0{part}")  # in this order also within the second of their names


def found(folder: Path) -> list[tuple[str, int]]:
    return [(event.summary.value[0].tag, event.step) for event in covered_events(folder, 2, SAVED)]


def test_events_of_the_step_or_later_up_to_the_checkpoint(tmp_path: Path):
    write(tmp_path, 0, None, ("a", 1, 0), ("a", 2, 0), ("b", 3, 999), ("b", 4, 1001), ("c", 2, 1001))
    assert found(tmp_path) == [("a", 2), ("b", 3)]


def test_events_that_were_purged_by_then_stay_away(tmp_path: Path):
    """The second part began anew from step 3; a third, which came after the checkpoint, from step 2."""
    write(tmp_path, 0, 0, ("a", 2, 0), ("a", 3, 0), ("a", 4, 0))
    write(tmp_path, 1, 3, ("a", 3, 10))
    write(tmp_path, 2, 2.5, ("a", 2, 2001))
    assert found(tmp_path) == [("a", 2), ("a", 3)]
    assert [event.wall_time for event in covered_events(tmp_path, 3, SAVED)] == [NOW + 10]


def test_copies_that_a_failed_resume_made_are_not_copied_again(tmp_path: Path):
    write(tmp_path, 0, 0, ("a", 2, 0), ("a", 2, 1), ("b", 2, 0))
    write(tmp_path, 1, 2.5, ("a", 2, 0), ("a", 2, 1), ("b", 2, 0))
    assert found(tmp_path) == [("a", 2), ("a", 2), ("b", 2)]


def test_all_is_copied_that_is_not_logged_in_another_way(tmp_path: Path):
    """``loss`` of step 2 comes from the checkpoint; what every start writes, from the start."""
    tags = ("loss", "text", "_hparams_/session_start_info", "custom_scalars__config__")
    write(tmp_path / "run/version_0", 0, 0, *((tag, step, 0) for tag in tags for step in (1, 2, 3)))
    logger = TensorBoardLogger(tmp_path, name="run", version=0, purge_step=2)
    copy_events(logger, 2, SAVED, skip={"loss"})
    logger.experiment.flush()
    assert shown(tmp_path / "run/version_0") == {"loss": [1, 3], "text": [1, 2, 3]}
    logger.finalize("success")


def test_what_a_checkpoint_covers_is_on_the_disk_before_it(tmp_path: Path, tiny_lm: Path, monkeypatch: Any):
    """TensorBoard writes in a thread of its own."""
    files: list[int] = []

    class Ends(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            monkeypatch.setattr(SummaryWriter, "flush", lambda self: files.append(len([*tmp_path.rglob("step-*")])))

    callbacks, logger = [Ends(), StepCheckpoint(1)], TensorBoardLogger(tmp_path)
    trainer = make_trainer(tmp_path, callbacks=callbacks, logger=logger, max_steps=1, enable_checkpointing=True)
    trainer.fit(make_module(tiny_lm), make_data(tmp_path))
    assert files[:2] == [0, 1]  # for the checkpoint, and for the numbers of the step
