"""Modules so small that tests of the command spend their time on the command."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

CONFIG: dict[str, Any] = {
    "model": {"class_path": "tests.helpers.cli_toys.Toy"},
    "data": {"class_path": "tests.helpers.cli_toys.ToyData"},
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False, "num_sanity_val_steps": 0},
    "checkpoint": {"every_n_train_steps": 3},
}


class Toy(L.LightningModule):
    """Pulls weights to 0."""

    def __init__(
        self, width: int = 4, lr: float = 0.1, sleep: float = 0.0, fail_at: int = -1, start: str | None = None
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"Toy(width={width}): must be at least 1")
        self.save_hyperparameters()
        self.lr, self.sleep, self.fail_at = lr, sleep, fail_at
        self.net = torch.nn.Linear(width, 1)
        self.progress = SimpleNamespace(phase="", detail="", since=None)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.progress.phase = "update"
        if self.global_step == self.fail_at:
            raise RuntimeError(f"Toy(fail_at={self.fail_at}): failed as told; use -1")
        time.sleep(self.sleep)
        loss = self.net(batch[0]).pow(2).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.net(batch[0]).pow(2).mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.net(batch[0]).pow(2).mean())

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def save_pretrained(self, dirpath: Path) -> None:
        (dirpath / "config.json").write_text("{}")
        torch.save(self.net.state_dict(), dirpath / "weights.pt")


class ToyData(L.LightningDataModule):
    """Rows of ones; says where it would read from."""

    def __init__(self, path: str | None = None, rows: int = 32, data_root: str | None = None) -> None:
        super().__init__()
        self.rows = rows
        print(f"ToyData reads {path} under {data_root}")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.ones(self.rows, 4)), batch_size=4)  # alike: order cannot matter

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class RootlessData(L.LightningDataModule):
    """Takes no ``data_root``."""


class Shout(L.Callback):
    """A callback of the user's."""

    def __init__(self, word: str = "hello") -> None:
        self.word = word

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        print(f"{self.word}!")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        heartbeat = getattr(trainer.progress_bar_callback, "_heartbeat", None)
        if heartbeat is not None and heartbeat.tick is not None:
            print("the heartbeat shows the progress line")
