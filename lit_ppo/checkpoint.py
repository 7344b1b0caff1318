"""Checkpoints that are whole or not there, and the search for the newest."""

import re
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lit_ppo.errors import CommandError

PARTIAL = ".partial"


class StepCheckpoint(Checkpoint):
    """Saves the run every so many steps and at the end, keeping the newest checkpoints.

    Each is written under another name and renamed once it is whole, so that what lies there can be loaded. One step
    is one optimizer step in supervised training and one PPO update with ``LitPPO``.

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
        self._last_step = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, on all ranks alike."""
        if self.dirpath is None and stage == "fit":
            self.dirpath = str(Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What a resumed run starts from lies there already."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save when the step is due, and when it is the last that was asked for.

        By the end of training Lightning has counted the epoch as done: a run with more steps would skip its rest.
        """
        if trainer.global_step % self.every_n_train_steps == 0 or trainer.global_step == trainer.max_steps:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what has been learnt since."""
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Save this step, unless it has been saved; collective over ranks."""
        step = trainer.global_step
        if step == self._last_step or trainer.fast_dev_run or self.dirpath is None:  # type: ignore[attr-defined]
            return
        self._last_step = step
        path = Path(self.dirpath) / f"step-{step:06d}.ckpt"
        partial = path.with_name(path.name + PARTIAL)
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            if path.exists():
                trainer.strategy.remove_checkpoint(path)
            partial.rename(path)
            kept = sorted(path.parent.glob("step-*.ckpt"), key=lambda p: (step_of(p), p.name))
            for old in [*kept[: -self.keep], *path.parent.glob(f"step-*{PARTIAL}")]:
                trainer.strategy.remove_checkpoint(old)
        trainer.strategy.barrier("checkpoint in place")


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
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, step_of(path)))


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
    return max(found, key=lambda path: (path.stat().st_mtime_ns, step_of(path)))
