"""Helpers for the tests of the supervised modules: small batches, and a Trainer that leaves nothing behind."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers import toys

HOW_TESTS_USE_LIGHTNING = pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec:",  # Lightning's own use of torch
    "ignore:.*does not have many workers:",
    "ignore:You defined a `validation_step` but have no `val_dataloader`:",
    "ignore:The number of training batches:",
)


def pad(rows: list[list[int]], pad_id: int, width: int | None = None) -> dict[str, Tensor]:
    """Right-padded ids and their mask."""
    width = width or max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [pad_id] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def text_batch(rows: list[list[int]], pad_id: int = 0, width: int | None = None) -> dict[str, Tensor]:
    """A batch for LitSFT: every token is a target."""
    batch = pad(rows, pad_id, width)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def loader(batches: list[Any]) -> "DataLoader[Any]":
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a data set


def make_trainer(tmp_path: Path, **kwargs: Any) -> L.Trainer:
    return toys.make_trainer(tmp_path, **{"logger": False, "max_steps": -1, "max_epochs": 1} | kwargs)


def fit(module: L.LightningModule, batches: list[Any], tmp_path: Path, **kwargs: Any) -> L.Trainer:
    """Train on the batches, in order."""
    trainer = make_trainer(tmp_path, **kwargs)
    trainer.fit(module, loader(batches))
    return trainer


def weights(module: L.LightningModule) -> Tensor:
    """All weights of the module in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])
