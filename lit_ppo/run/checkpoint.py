"""Checkpoints that are whole or not there, and the search for the newest."""

import re
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lit_ppo.parallel.checkpoint_io import PARTIAL, put_in_place, use_whole_files
from lit_ppo.parallel.ranks import gather_shares
from lit_ppo.run.errors import CommandError
from lit_ppo.run.events import tell_again
from lit_ppo.run.preemption import StopRequest

RUN = "lit_ppo_run"  # key of what this callback adds to a checkpoint


class StepCheckpoint(Checkpoint):
    """Saves the run every so many steps and at the end, keeping the newest checkpoints.

    Each is written under another name and renamed once it is whole and on the disk, so that what lies there can be
    loaded. One step is one optimizer step in supervised training and one PPO update with ``LitPPO``. Where validation
    follows a step, the checkpoint does so after it: a resumed run then misses nothing that is logged.

    SIGTERM, and SLURM's signal that a job is to be requeued, let the step at work end, save it and end the run; a
    second signal ends it at once.

    Args:
        every_n_train_steps: Steps between two checkpoints.
        keep: How many to keep; the oldest is removed after a new one is in place.
        dirpath: Folder for them. None: ``checkpoints`` in the run's own folder.
    """

    def __init__(self, every_n_train_steps: int = 50, keep: int = 2, dirpath: str | None = None) -> None:
        for name, value in {"every_n_train_steps": every_n_train_steps, "keep": keep}.items():
            if value < 1:
                raise ValueError(f"StepCheckpoint({name}={value}): {name} must be at least 1")
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self.dirpath = dirpath
        self.config: dict[str, Any] | None = None  # the run's, where a command has one
        self.log_again = False  # on resume: loggers are to be told again what the checkpoint covers
        self.stop_request = StopRequest()
        self._last_step = -1
        self._after_validation = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, on all ranks alike."""
        use_whole_files(trainer)
        if self.dirpath is None and stage == "fit":
            self.dirpath = str(Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What a resumed run starts from lies there already."""
        self._last_step = trainer.global_step
        self.stop_request.listen(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save when the step is due, and when it is the last that was asked for.

        By the end of training Lightning has counted the epoch as done: a run with more steps would skip its rest.
        """
        stop = self.stop_request.agreed()
        due = trainer.global_step % self.every_n_train_steps == 0 or trainer.global_step == trainer.max_steps
        now = bool(stop) or trainer.should_stop
        self._after_validation = due and not now and _validation_follows(trainer)
        if now or (due and not self._after_validation):
            self.save(trainer)
        if stop:
            self.stop_request.obey(trainer, stop)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what waited for it."""
        if self._after_validation and not trainer.sanity_checking:
            self._after_validation = False
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what has been learnt since."""
        self.save(trainer)
        self.stop_request.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave signals to others."""
        self.stop_request.close()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the configuration, and what the step logs if the logger is told only after the checkpoint is there.

        Whoever saves it: at the end of a batch the loops have not completed it yet.
        """
        told, logged = trainer.global_step, {}
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        at_its_end = trainer.training and progress.processed > progress.completed
        if at_its_end and trainer._logger_connector.should_update_logs:
            told = trainer.fit_loop.epoch_loop._batches_that_stepped
            # validation before the first update has been told under the same step
            metrics = trainer._logger_connector.metrics["log"] if told else trainer.logged_metrics
            logged = {name: float(value) for name, value in metrics.items()}
            logged["epoch"] = trainer.current_epoch
        for logger in _tensorboards(trainer):
            logger.experiment.flush()  # what the checkpoint covers outlives a crash
        checkpoint[RUN] = {"config": self.config, "logged": logged, "steps_logged": told, "time": time.time()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell the loggers what they had been told by then, where they have been made to forget it."""
        run = checkpoint.get(RUN)
        if not self.log_again or not run:
            return
        for tensorboard in _tensorboards(trainer):
            tell_again(tensorboard, steps_logged(checkpoint), run["time"], but=run["logged"])
        for logger in trainer.loggers if run["logged"] else ():
            logger.log_metrics(run["logged"], step=steps_logged(checkpoint))

    def save(self, trainer: L.Trainer) -> None:
        """Save this step, unless it has been saved; collective over ranks.

        Raises:
            CheckpointError: It cannot be written.
        """
        step = trainer.global_step
        if step == self._last_step or trainer.fast_dev_run or self.dirpath is None:  # type: ignore[attr-defined]
            return
        self._last_step = step
        path = Path(self.dirpath) / f"step-{step:06d}.ckpt"
        partial = path.with_name(path.name + PARTIAL)
        # not trainer.save_checkpoint, in which ranks would wait for one that has failed
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        gather_shares(lambda: trainer.strategy.save_checkpoint(checkpoint, partial))
        gather_shares(lambda: self._publish(trainer, partial, path))

    def _publish(self, trainer: L.Trainer, partial: Path, path: Path) -> None:
        if trainer.is_global_zero:
            put_in_place(partial, path)
            kept = sorted(path.parent.glob("step-*.ckpt"), key=_age)
            for old in [*kept[: -self.keep], *path.parent.glob(f"step-*{PARTIAL}")]:
                trainer.strategy.remove_checkpoint(old)


def _validation_follows(trainer: L.Trainer) -> bool:
    """Whether Lightning will validate between this batch and the next."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if fetcher is None or not loop._should_check_val_fx(fetcher):
        return False
    loop.val_loop.setup_data()
    return not loop.val_loop.skip


def _tensorboards(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """Those that this process writes to."""
    return [x for x in trainer.loggers if isinstance(x, TensorBoardLogger)] if trainer.is_global_zero else []


def _age(checkpoint: Path) -> tuple[int, int]:
    """Newer ones are greater; by the clock first, as a run that went back to an earlier step writes smaller ones."""
    return checkpoint.stat().st_mtime_ns, step_of(checkpoint)


def steps_logged(summary: dict[str, Any]) -> int:
    """Steps whose logs were there for good when a checkpoint was written; its own may be told only afterwards."""
    return int((summary.get(RUN) or {}).get("steps_logged", summary["global_step"]))


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name, -1 if there is none.

    >>> step_of(Path("step-000120.ckpt"))
    120
    """
    match = re.search(r"step[-=](\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of one run folder, or one checkpoint folder, oldest first."""
    found = [*folder.glob("checkpoints/*.ckpt"), *folder.glob("*.ckpt")]
    return sorted(found, key=_age)


def find_last(root: Path, dirpath: str | None = None) -> Path:
    """The newest complete checkpoint of the runs under ``root``.

    Args:
        root: ``trainer.default_root_dir``.
        dirpath: ``checkpoint.dirpath``, searched instead where it is set.

    Raises:
        CommandError: There is none.
    """
    folders = [Path(dirpath)] if dirpath else [root, *root.glob("version_*")]
    found = [path for folder in folders for path in find_checkpoints(folder)]
    if not found:
        where = dirpath or f"{root}/version_*/checkpoints"
        raise CommandError(
            f"--ckpt_path last: no complete checkpoint under {where}; leave --ckpt_path out to start afresh, "
            "or set --trainer.default_root_dir to the folder of the run to continue"
        )
    return max(found, key=_age)
