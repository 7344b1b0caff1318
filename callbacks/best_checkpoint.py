"""Keep a checkpoint of the best update, and restore its weights at the end of a run."""

import itertools
import re
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_ppo.callbacks.trainer import of_first_process

NAME = re.compile(r"best-step-(\d+)(?:-v\d+)?\.ckpt")


class BestCheckpoint:
    """The checkpoint of the best update so far, ``best-step-....ckpt``, next to the other checkpoints.

    Args:
        owner: Class name for messages.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.path: str | None = None
        self._saved: set[Path] = set()

    def save(self, trainer: Any, update: int) -> None:
        """Save this update and delete the previous best.

        Args:
            trainer: The trainer.
            update: Number of updates done.
        """
        log_dir = trainer.log_dir  # collective: Lightning broadcasts it
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        folder = Path(folder or Path(log_dir or trainer.default_root_dir) / "checkpoints")
        file = of_first_process(trainer, lambda: self._free_path(folder, update))
        before, self.path = self.path, str(file)
        self._saved.add(file)
        trainer.save_checkpoint(file, weights_only=False)
        is_ours = before is not None and Path(before).parent == folder and NAME.fullmatch(Path(before).name)
        if is_ours and before != self.path:  # not another run's
            trainer.strategy.remove_checkpoint(before)

    def _free_path(self, folder: Path, update: int) -> Path:
        """A path where a checkpoint replaces nothing but one of this run."""
        versions = itertools.chain([""], (f"-v{number}" for number in itertools.count(1)))
        files = (folder / f"best-step-{update:06d}{version}.ckpt" for version in versions)
        return next(file for file in files if file in self._saved or not (file.exists() or file.is_symlink()))

    def restore(self, trainer: Any, pl_module: Any, update: int) -> bool:
        """Load the weights of an update, if its checkpoint exists, and make the checkpoint the newest one.

        Args:
            trainer: The trainer.
            pl_module: The module.
            update: Number of updates done at the best one.

        Returns:
            Whether the weights were loaded.
        """
        path = self.path
        exists = of_first_process(trainer, lambda: path is not None and Path(path).is_file())
        found = NAME.fullmatch("" if path is None else Path(path).name)
        if path is None or not exists or found is None or int(found[1]) != update:
            rank_zero_warn(f"{self.owner}: no checkpoint of update {update} ({path}); the weights do not change")
            return False
        try:
            checkpoint = trainer.strategy.load_checkpoint(path)
        except RuntimeError as error:  # damaged
            rank_zero_warn(f"{self.owner}: {error}; the weights do not change")
            return False
        trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)
        if trainer.is_global_zero:
            Path(path).touch()
        rank_zero_info(f"{self.owner}: restored the weights of update {update}; resume from {path}")
        return True
