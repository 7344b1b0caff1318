"""Data modules for the toy: prompts that are only numbered, and texts."""

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

T, FEATURES, TOKENS = 4, 3, 5  # longest response, numbers that describe a position, vocabulary


@dataclass
class Prompts:
    """What the toy's data hands out to look at: their number is what the toy responds to."""

    prompts: list[str]


class ToyData(L.LightningDataModule):
    """The toy's data set: every row once an update, or all rows that have a weight, drawn by it one after another.

    It saves nothing: a trick that sets weights has to set them again.
    """

    peeks = ("train", "val")  # splits that can be looked at

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.columns = {"level": list(range(rows)), "size": [float(-row) for row in range(rows)]}
        self.weights: Tensor | None = None

    def set_weights(self, weights: Any) -> None:
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64).clone()

    def drawn(self, update: int) -> list[int]:
        assert self.weights is not None
        n, random = int(self.weights.count_nonzero()), torch.Generator().manual_seed(update)
        rows: list[int] = torch.multinomial(self.weights, n, generator=random).tolist()
        return rows

    def peek(self, split: str, n: int) -> Prompts | None:
        return Prompts([f"prompt {i}" for i in range(min(n, 5))]) if split in self.peeks else None

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader([0], batch_size=None)  # an epoch is an update


class ToyTexts(L.LightningDataModule):
    """Five texts that the toy can learn from, in batches of two; knows nothing of lit_ppo.

    Args:
        seed: Of the texts and, if the one who draws them asks for it, of their order.
        shuffle: As a ``DataLoader`` takes it.
    """

    def __init__(self, seed: int = 0, shuffle: bool = True) -> None:
        super().__init__()
        self.seed, self.shuffle = seed, shuffle
        self.calls: list[str] = []
        self.pages = 0  # read so far, says this data module

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}" + (" with a trainer" if self.trainer is not None else ""))
        random = torch.Generator().manual_seed(self.seed)
        features = torch.randn(5, T, FEATURES, generator=random)
        actions = torch.randint(TOKENS, (5, T), generator=random)
        self.rows = [{"row": i, "features": features[i], "actions": actions[i]} for i in range(5)]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=2, shuffle=self.shuffle)

    def state_dict(self) -> dict[str, Any]:
        return {"pages": self.pages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pages = state_dict["pages"]
