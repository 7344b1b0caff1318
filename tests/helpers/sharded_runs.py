"""A module that shards itself, and runs of it whose checkpoints are folders with the shards of each rank."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lit_ppo.run.checkpoint import StepCheckpoint
from tests.helpers.toys import make_trainer


class ShardedModule(L.LightningModule):
    """A line through random points."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Linear(8, 8)

    def configure_model(self) -> None:
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        rows: Any = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(rows, batch_size=2)


def fit_sharded(folder: Path, steps: int, start: str | None = None) -> None:
    """Train on the ranks of the process group; checkpoints are in ``folder / "saved"``."""
    trainer = make_trainer(
        folder, devices=torch.distributed.get_world_size(), max_steps=steps, enable_checkpointing=True,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        callbacks=[StepCheckpoint(every_n_train_steps=1, keep=9, dirpath=str(folder / "saved"))],
    )  # fmt: skip
    trainer.fit(ShardedModule(), ckpt_path=start, weights_only=True)
