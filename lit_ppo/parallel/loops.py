"""Lightning's training loops, resumed exactly where a checkpoint was saved."""

from typing import Any

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


def use_exact_loops(trainer: L.Trainer) -> None:
    """Let the trainer do after a resume what it would have done after the checkpoint. Call it in ``setup``.

    Lightning 2.6 skips what follows the batch of the checkpoint: validation that is due, the end of the epoch and, in
    the next epoch, its start. It counts that epoch wrongly, and a second resume trains one too many. If nothing is left
    to train, it also skips ``on_train_start`` and ``on_train_end``.
    """
    if type(trainer.fit_loop) is _FitLoop and type(trainer.fit_loop.epoch_loop) is _TrainingEpochLoop:
        trainer.fit_loop.__class__ = ExactFitLoop
        trainer.fit_loop.epoch_loop.__class__ = ExactEpochLoop


class ExactFitLoop(_FitLoop):
    """Ends the epoch of the checkpoint first, and ends a run also if nothing is left to train."""

    @property
    def done(self) -> bool:
        epochs: Any = self.epoch_progress.total
        in_epoch = self.is_resuming and epochs.processed < epochs.started
        return not in_epoch and super().done

    @property
    def skip(self) -> bool:
        return 0 in (self.max_batches, self.trainer.limit_train_batches) or (not self.is_resuming and self.done)

    @property
    def restarting(self) -> bool:
        return self._restarting

    @restarting.setter
    def restarting(self, restarting: bool) -> None:
        """Restart the epoch if it has begun; Lightning also restarts one that has ended, if ``max_steps`` is set."""
        epochs: Any = self.epoch_progress.total
        _Loop.restarting.fset(self, restarting and epochs.processed < epochs.ready)  # type: ignore[attr-defined]
        self.epoch_loop.val_loop.restarting = restarting  # no sanity check, which would reset its counters

    def load_state_dict(self, state_dict: dict[str, Any], prefix: str = "") -> None:
        """Restore the counters. An epoch that the end of the run has cut short continues."""
        super().load_state_dict(state_dict, prefix)
        epochs, batches = self.epoch_progress, self.epoch_loop.batch_progress
        total: Any = epochs.total
        goes_on = self.epoch_loop.global_step != self.max_steps
        if goes_on and total.processed == total.ready and batches.current.ready and not batches.is_last_batch:
            current: Any = epochs.current
            for counts in (total, current):
                counts.processed = counts.completed = counts.ready - 1
            if self.epoch_loop._accumulated_batches_reached():
                self.epoch_loop._batches_that_stepped -= 1  # as in the checkpoint of a batch
            self.restarting = True


class ExactEpochLoop(_TrainingEpochLoop):
    """Does what follows the batch of the checkpoint before it takes the next one."""

    restarted_on_train_batch_end = restarted_on_last = False  # as Lightning would treat them

    def reset(self) -> None:
        resumed, batches = self._restarting, self.batch_progress
        in_batch_end = resumed and batches.total.completed < batches.total.processed  # type: ignore[attr-defined]
        if in_batch_end:
            batches.increment_completed()
        stepped = self._batches_that_stepped
        super().reset()  # counts the step of the batch, which checkpoints do not count yet
        if resumed:
            self.restarting = False
        if in_batch_end:
            self._batches_that_stepped = stepped
            fetcher: Any = self.trainer.fit_loop._data_fetcher
            self.on_advance_end(fetcher)
