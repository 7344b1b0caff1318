"""The folder of a run: checkpoints, model, samples and configuration lie in it."""

import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_ppo.parallel.trainer import check_writable
from lit_ppo.run.errors import CommandError
from lit_ppo.run.stop import is_first_process

PREFIX = "version_"
STARTED = ("config.yaml", "hparams.yaml", "samples.jsonl")  # with events, the files of a run before its first update
EVENTS = "events.out.tfevents."
COMPLETED = "lit_ppo_completed.json"  # of a run that has done everything; names its last checkpoint


class RunTrainer(L.Trainer):
    """A trainer whose run has a folder even without a logger, or if that keeps runs elsewhere, as W&B and MLflow do."""

    run_folder: str | None = None

    @property
    def log_dir(self) -> str | None:
        """The run folder; the first rank's, on every rank."""
        if self.run_folder is None:
            return super().log_dir
        folder: str = self.strategy.broadcast(self.run_folder)
        return folder

    @property
    def needs_folder(self) -> bool:
        """Whether no logger gives the run a folder."""
        return not self.loggers or not isinstance(self.loggers[0], TensorBoardLogger | CSVLogger)


def claim_version(root: Path) -> int | None:
    """Create the next free ``version_N`` and return N, so that two commands that start at once do not share one."""
    if not is_first_process():
        return None  # this process uses the first one's
    try:
        check_writable("Trainer", "default_root_dir", root)
    except ValueError as error:
        raise CommandError(str(error), exit_code=2) from error
    root.mkdir(parents=True, exist_ok=True)
    n = len(PREFIX)
    taken = [int(path.name[n:]) for path in root.glob(f"{PREFIX}*") if path.name[n:].isdigit()]
    for version in itertools.count(max(taken, default=-1) + 1):
        with contextlib.suppress(FileExistsError):
            (root / f"{PREFIX}{version}").mkdir()
            return version
    return None


def discard_unused(folder: Path) -> None:
    """Remove the folder of a run that has ended before its first update, if it holds nothing but the start of one."""
    with contextlib.suppress(OSError):
        found = list(folder.iterdir())
        empty = [path for path in found if path.is_dir() and not path.is_symlink() and not any(path.iterdir())]
        if all(path in empty or path.name in STARTED or path.name.startswith(EVENTS) for path in found):
            shutil.rmtree(folder)


def mark_completed(folder: Path, checkpoint: Path) -> None:
    """Note that a run has done everything, up to report and export; ``checkpoint`` is its last one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMPLETED).write_text(json.dumps({"checkpoint": os.path.relpath(checkpoint, folder)}) + "\n")


def is_completed(checkpoint: Path, run: dict[str, Any]) -> bool:
    """Whether the run of a checkpoint has done everything.

    Args:
        checkpoint: Its path.
        run: What ``StepCheckpoint`` has added to it.
    """
    folder = checkpoint.parent / run.get("folder", os.pardir)
    try:
        done = json.loads((folder / COMPLETED).read_text())
        return os.path.samefile(folder / done["checkpoint"], checkpoint)
    except (OSError, ValueError, LookupError, TypeError):
        return False
