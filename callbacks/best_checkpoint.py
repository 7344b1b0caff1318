"""Keep a checkpoint of the best update, and restore its weights at the end of a run."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_ppo.callbacks.trainer import of_first_process


class BestCheckpoint:
    """The checkpoint of the best update so far, ``best-step-....ckpt``, next to the other checkpoints.

    Args:
        owner: Class name for messages.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.path: str | None = None

    def save(self, trainer: Any, update: int) -> None:
        """Save this update and delete the previous best.

        Args:
            trainer: The trainer.
            update: Number of updates done.
        """
        log_dir = trainer.log_dir  # collective: Lightning broadcasts it
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        file = Path(folder or Path(log_dir or trainer.default_root_dir) / "checkpoints") / _name(update)
        before, self.path = self.path, str(file)
        trainer.save_checkpoint(file, weights_only=False)
        if before is not None and before != self.path and Path(before).parent == file.parent:  # not another run's
            trainer.strategy.remove_checkpoint(before)

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
        if path is None or not exists or Path(path).name != _name(update):
            rank_zero_warn(f"{self.owner}: no checkpoint of update {update} ({path}); the weights do not change")
            return False
        checkpoint = trainer.strategy.load_checkpoint(path)
        trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)
        if trainer.is_global_zero:
            Path(path).touch()
        rank_zero_info(f"{self.owner}: restored the weights of update {update}; resume from {path}")
        return True


def _name(update: int) -> str:
    return f"best-step-{update:06d}.ckpt"
