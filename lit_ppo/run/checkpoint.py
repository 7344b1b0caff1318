"""Checkpoints of a run, and the search for the newest."""

import itertools
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lit_ppo.constructor import constructor
from lit_ppo.parallel.checkpoint_io import (
    CheckpointError,
    checked_entries,
    guard_sharded,
    is_complete,
    read_summary,
    save_checked,
    use_atomic_checkpoints,
)
from lit_ppo.parallel.entries import check_complete
from lit_ppo.parallel.files import abandoned
from lit_ppo.parallel.loops import use_exact_loops
from lit_ppo.parallel.ranks import gather_shares, greatest, rank
from lit_ppo.parallel.trainer import check_writable
from lit_ppo.run.errors import CommandError
from lit_ppo.run.events import copy_events
from lit_ppo.run.folder import COMPLETED, is_completed, mark_completed
from lit_ppo.run.random_state import random_state, restore_random_state
from lit_ppo.run.resume import changes
from lit_ppo.run.stop import StopRequest
from lit_ppo.validate import integer, path_or_none

RUN = "lit_ppo_run"  # key of what this callback adds to a checkpoint


class StepCheckpoint(Checkpoint):
    """Saves the run every few steps and at its end, and keeps the newest checkpoints.

    A checkpoint gets its name only when it is complete and on the disk. One step is an optimizer step in supervised
    training and a PPO update with ``LitPPO``. If validation follows a step, the checkpoint is saved after it, so that
    a resumed run misses nothing that is logged.

    After SIGTERM, or SLURM's requeue signal, the current step ends, is saved, and the run ends. A second signal ends
    the run at once. When everything is done, report and export included, ``lit_ppo_completed.json`` appears in the
    run's folder. A run that is killed after its last checkpoint, and resumed, does what is missing.

    Args:
        every_n_train_steps: Steps between two checkpoints.
        keep: Number of checkpoints of this run to keep. The oldest is removed after a new one is complete.
        dirpath: Folder of the checkpoints. None: ``checkpoints`` in the run's folder.
    """

    @constructor
    def __init__(self, every_n_train_steps: int = 50, keep: int = 2, dirpath: str | None = None) -> None:
        self.every_n_train_steps = integer(self, "every_n_train_steps", every_n_train_steps)
        self.keep = integer(self, "keep", keep)
        self.dirpath = path_or_none(self, "dirpath", dirpath)
        self.config: dict[str, Any] | None = None  # the run's, set by the command
        self.log_again = False  # whether a resumed run logs into the folder of the run that it resumes
        self.stop_request = StopRequest()
        self._id = uuid.uuid4().hex  # of this run; a run that resumes it has the same
        self._own: set[Path] = set()  # checkpoints of this run, which alone it may replace and remove
        self._last_step = -1
        self._after_validation = False
        self._run_folder = Path()
        self._random: list[dict[str, Any]] = []  # by rank, of the checkpoint
        self._ended = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        use_atomic_checkpoints(trainer)
        guard_sharded(trainer)
        use_exact_loops(trainer)
        self._ended = False
        if self.dirpath is None and stage == "fit":
            self.dirpath = str(Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")
        if self.dirpath is not None and stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = Path(self.dirpath)
            gather_shares(lambda: check_writable(self, "dirpath", folder) if trainer.is_global_zero else None)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        start = trainer.ckpt_path
        if start is None or Path(start).parent.absolute() == Path(self.dirpath or "").absolute():
            self._last_step = trainer.global_step  # a resumed run starts from a checkpoint of this step
        self._run_folder = Path(trainer.log_dir or trainer.default_root_dir)  # collective
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            (self._run_folder / COMPLETED).unlink(missing_ok=True)
        if trainer.ckpt_path is not None and trainer.is_global_zero and self.dirpath is not None:
            self._own |= {path for path in Path(self.dirpath).glob("step-*.ckpt") if _id_of(path) == self._id}
        if rank() < len(self._random):
            restore_random_state(self._random[rank()])
        self.stop_request.listen(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save if the step is due, is the last one, or a signal asked for it.

        The last step must be saved here: at the end of training Lightning counts the epoch as finished, and a longer
        run would skip the rest of it.
        """
        if trainer.fit_loop._should_accumulate():
            return  # no checkpoint holds the gradients so far
        stop = greatest(self.stop_request.received)  # from any rank
        step = trainer.global_step
        due = step % self.every_n_train_steps == 0 or step == trainer.max_steps or _ends_last_epoch(trainer)
        now = bool(stop) or trainer.should_stop
        self._after_validation = due and not now and _validation_follows(trainer)
        if now or (due and not self._after_validation):
            self.save(trainer)
        if stop:
            self.stop_request.obey(trainer, stop)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (self._after_validation or trainer.should_stop) and not trainer.sanity_checking:
            self._after_validation = False
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)
        self._remove_old(trainer)  # also if the run was killed when it had just saved
        self.stop_request.close()
        self._ended = not trainer.fast_dev_run  # type: ignore[attr-defined]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.stop_request.close()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the configuration, and the metrics of this step if they reach the logger only after the checkpoint.

        That is so for any checkpoint saved at the end of a batch, also by another callback.
        """
        # Lightning's step for loggers. What is shown of it is copied by a resumed run, as the end may show more of it
        steps = max(0, min(trainer.fit_loop.epoch_loop._batches_that_stepped, trainer.global_step - 1))
        logged: dict[str, float] = {}
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        in_batch_end = trainer.training and progress.processed > progress.completed
        if in_batch_end and trainer._logger_connector.should_update_logs:
            # validation before the first update is logged under the same step
            metrics = trainer._logger_connector.metrics["log"] if steps else trainer.logged_metrics
            logged = {name: float(value) for name, value in metrics.items()} | {"epoch": trainer.current_epoch}
        for logger in _tensorboard_loggers(trainer):
            logger.experiment.flush()  # so that a crash keeps all that the checkpoint covers
        run = {"config": self.config, "logged": logged, "steps_logged": steps, "time": time.time(), "id": self._id}
        folder, states = os.path.relpath(self._run_folder, self.dirpath or None), gather_shares(random_state)
        checkpoint[RUN] = {**run, "folder": folder, "stopping": trainer.should_stop, "random": states}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Log again what the checkpoint covers, and the continued log does not show; obey a stop that it precedes."""
        run = checkpoint.get(RUN) or {}
        self._id = run.get("id", self._id)
        is_same = not changes(run.get("config") or {}, self.config or {})
        self._random = run.get("random", [])
        completed = is_completed(Path(trainer.ckpt_path or ""), run)
        if trainer.training and run.get("stopping") and is_same and not completed:
            trainer.should_stop = True
        if not self.log_again or not run:
            return
        with checked_entries(trainer.ckpt_path):
            check_complete(checkpoint, [f"{RUN}.{name}" for name in ("steps_logged", "logged", "time")])
        step, logged = run["steps_logged"], run["logged"]
        for tensorboard in _tensorboard_loggers(trainer):
            copy_events(tensorboard, step, run["time"], skip=logged)
        if logged:
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=step)

    def save(self, trainer: L.Trainer) -> None:
        """Save this step, unless it is saved already. Collective.

        Raises:
            CheckpointError: The checkpoint cannot be written.
            RuntimeError: Another rank cannot write it.
        """
        step = trainer.global_step
        if step == self._last_step or trainer.fast_dev_run or self.dirpath is None:  # type: ignore[attr-defined]
            return
        self._last_step = step
        path = trainer.strategy.broadcast(self._free_path(Path(self.dirpath), f"step-{step:06d}"))
        self._own.add(path)
        # not Trainer.save_checkpoint: there the other ranks would wait at a barrier for a rank that failed
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        save_checked(trainer.strategy, checkpoint, path)
        self._remove_old(trainer)

    def _free_path(self, folder: Path, name: str) -> Path:
        """A path where a checkpoint replaces nothing but one of this run."""
        path = folder / f"{name}.ckpt"
        for version in itertools.count(1):
            if path in self._own or not os.path.lexists(path):
                break
            path = folder / f"{name}-v{version}.ckpt"
        if path.stem != name:
            rank_zero_info(
                f"StepCheckpoint(dirpath={str(folder)!r}): {name}.ckpt is not of this run; saves {path.name}"
            )
        return path

    def _remove_old(self, trainer: L.Trainer) -> None:
        """Collective."""
        if not trainer.fast_dev_run and self.dirpath is not None:  # type: ignore[attr-defined]
            gather_shares(lambda: self._keep_newest(trainer, Path(self.dirpath or "")))

    def _keep_newest(self, trainer: L.Trainer, folder: Path) -> None:
        if not trainer.is_global_zero:
            return
        self._own = {path for path in self._own if path.exists()}
        found = sorted(self._own, key=_age)
        kept = [path for path in found if is_complete(path)][-self.keep :]
        for path in [*found, *abandoned(folder, "step-*.ckpt")]:
            if path not in kept:
                trainer.strategy.remove_checkpoint(path)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note that the run has done everything."""
        saved = find_checkpoints(Path(self.dirpath)) if self._ended and self.dirpath and trainer.is_global_zero else []
        if saved:
            mark_completed(self._run_folder, saved[-1])


def _ends_last_epoch(trainer: L.Trainer) -> bool:
    """Whether this batch is the last of the last epoch."""
    return trainer.current_epoch + 1 == trainer.max_epochs and trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def _id_of(checkpoint: Path) -> str | None:
    """The run that wrote a checkpoint; None if it cannot be read."""
    try:
        return (read_summary(checkpoint, compare=False).get(RUN) or {}).get("id")
    except (CheckpointError, OSError):
        return None


def _validation_follows(trainer: L.Trainer) -> bool:
    """Whether Lightning validates between this batch and the next; it has no public word for that."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if fetcher is None or not loop._should_check_val_fx(fetcher):
        return False
    loop.val_loop.setup_data()
    return not loop.val_loop.skip


def _tensorboard_loggers(trainer: L.Trainer) -> list[TensorBoardLogger]:
    """The loggers that this process writes with."""
    return [x for x in trainer.loggers if isinstance(x, TensorBoardLogger)] if trainer.is_global_zero else []


def steps_logged(summary: dict[str, Any]) -> int:
    """Steps whose metrics had reached the logger when a checkpoint was written, its own step perhaps not among them."""
    return int((summary.get(RUN) or {}).get("steps_logged", summary["global_step"]))


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name, -1 if there is none.

    >>> step_of(Path("step-000120.ckpt"))
    120
    """
    match = re.search(r"step[-=](\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def _age(checkpoint: Path) -> tuple[int, int]:
    """Sorts by time first: a run that resumed an earlier step writes lower steps later."""
    return checkpoint.stat().st_mtime_ns, step_of(checkpoint)


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run folder or a checkpoint folder, oldest first."""
    found = [*folder.glob("checkpoints/*.ckpt"), *folder.glob("*.ckpt")]
    return sorted(filter(is_complete, found), key=_age)


def find_runs_checkpoints(root: Path, dirpath: str | None = None) -> list[Path]:
    """The complete checkpoints of the runs under ``root``, oldest first.

    Args:
        root: ``trainer.default_root_dir``.
        dirpath: ``checkpoint.dirpath``; if given, only this folder is searched.

    Raises:
        CommandError: There is none.
    """
    folders = [Path(dirpath)] if dirpath else [root, *root.glob("version_*")]
    found = [path for folder in folders for path in find_checkpoints(folder)]
    if not found:
        where = dirpath or f"{root}/version_*/checkpoints"
        raise CommandError(
            f"--ckpt_path last: no complete checkpoint under {where}; leave --ckpt_path out to start a new run, "
            "or set --trainer.default_root_dir to the folder of the run to resume"
        )
    return sorted(found, key=_age)


def find_last(root: Path, dirpath: str | None = None) -> Path:
    """The newest of :func:`find_runs_checkpoints`."""
    return find_runs_checkpoints(root, dirpath)[-1]
