"""Short runs of the toy."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger

from tests.helpers.toy import Toy
from tests.helpers.toy_data import ToyData
from tests.helpers.toys import make_trainer


def trainer_of(callbacks: Sequence[L.Callback], updates: int, logger: Logger | None = None) -> L.Trainer:
    """A trainer that prints nothing, and writes nothing without a logger."""
    return make_trainer(Path(), max_steps=-1, max_epochs=updates, callbacks=[*callbacks], logger=logger or False)


def run_updates(
    callbacks: L.Callback | Sequence[L.Callback],
    updates: int = 1,
    *,
    module: L.LightningModule | None = None,
    resume: Path | None = None,
    save: Path | None = None,
    logger: Logger | None = None,
    **toy: Any,
) -> Any:
    """Train the toy for some updates and give it back.

    Args:
        callbacks: One, or a list.
        updates: Up to which update, those before ``resume`` included.
        module: Another module in the toy's place.
        resume: Checkpoint to go on from.
        save: Where to write a checkpoint at the end.
        logger: Where to log.
        **toy: Arguments of :class:`Toy`.
    """
    module = Toy(**toy) if module is None else module
    data = ToyData(module.episodes) if isinstance(module, Toy) else None
    trainer = trainer_of([callbacks] if isinstance(callbacks, L.Callback) else callbacks, updates, logger)
    with warnings.catch_warnings():  # Lightning's advice on workers, and on a toy's few batches
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*GPU available but not used.*")
        trainer.fit(module, datamodule=data, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return module


def scores_after(callbacks: Any, *batches: Sequence[float]) -> tuple[list[list[float]], dict[str, float]]:
    """What callbacks make of the scores of each update, and what is logged of the last one.

    Asserts that raw scores stay and that token rewards, without a KL penalty, are the scores that the callbacks left.
    """
    module = run_updates(
        callbacks, len(batches), episodes=len(batches[0]), kl_coef=0.0, scores=lambda update: batches[update]
    )
    for experience, batch in zip(module.experiences, batches, strict=True):
        assert torch.equal(experience.raw_scores, torch.tensor(batch))
        assert torch.equal(experience.rewards.sum(1), experience.scores)
    logged = {name: value.item() for name, value in module.trainer.logged_metrics.items()}
    return [experience.scores.tolist() for experience in module.experiences], logged
