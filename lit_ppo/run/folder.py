"""Where a run writes what is its own: checkpoints, model, samples, configuration."""

import contextlib
import itertools
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_ppo.run.interrupt import is_first_process

PREFIX = "version_"


class RunTrainer(L.Trainer):
    """A trainer with a run folder also where its logger has none of its own: W&B and MLflow keep runs elsewhere."""

    run_folder: str | None = None

    @property
    def log_dir(self) -> str | None:
        """The same on every rank, as the first process says."""
        if self.run_folder is None:
            return super().log_dir
        folder: str = self.strategy.broadcast(self.run_folder)
        return folder

    @property
    def needs_folder(self) -> bool:
        """Whether there is a logger, and one without folders."""
        return bool(self.loggers) and not isinstance(self.loggers[0], TensorBoardLogger | CSVLogger)


def claim_version(root: Path) -> int | None:
    """Make the next ``version_N``: two commands that start at once must not share one."""
    if not is_first_process():
        return None  # the first process says where
    root.mkdir(parents=True, exist_ok=True)
    n = len(PREFIX)
    taken = [int(path.name[n:]) for path in root.glob(f"{PREFIX}*") if path.name[n:].isdigit()]
    for version in itertools.count(max(taken, default=-1) + 1):
        with contextlib.suppress(FileExistsError):
            (root / f"{PREFIX}{version}").mkdir()
            return version
    return None
