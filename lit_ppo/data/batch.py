"""Batches of prompts, the same on every rank."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from lit_ppo.data.order import PromptOrder


@dataclass
class PromptBatch:
    """The prompts of one update, of all ranks.

    Args:
        prompts: Plain text; chat prompts as rendered by the template.
        prompt_ids: Tokens, cut from the left to the maximum length.
        prompt_index: (B,) int64, rows in the data set.
        columns: All other columns; for chat prompts also ``"messages"``, the message lists.
    """

    prompts: list[str]
    prompt_ids: list[list[int]]
    prompt_index: Tensor
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: Any, **kwargs: Any) -> "PromptBatch":
        """The batch with its index on ``device``; text and ids are lists."""
        return replace(self, prompt_index=self.prompt_index.to(device, **kwargs))


@dataclass
class PromptTable:
    """All prompts of a file."""

    prompts: list[str]
    prompt_ids: list[list[int]]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, rows: list[int]) -> PromptBatch:
        """A batch of these rows."""
        return PromptBatch(
            [self.prompts[i] for i in rows],
            [self.prompt_ids[i] for i in rows],
            torch.tensor(rows, dtype=torch.int64),
            {name: [values[i] for i in rows] for name, values in self.columns.items()},
        )

    @cached_property
    def fingerprint(self) -> str:
        """A digest of texts and columns, which changes with the data."""
        digest = hashlib.sha256()
        for i, prompt in enumerate(self.prompts):
            row = [prompt, {name: values[i] for name, values in self.columns.items()}]
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()


class TrainingPrompts(IterableDataset[PromptBatch]):
    """One epoch of batches from the current position.

    It has a length, so that Lightning does not prefetch: the rows of an update are drawn when it starts, since the
    previous update may change the sampling weights. It is not a map-style data set, which Lightning would split over
    ranks.

    Args:
        table: The prompts.
        order: The rows of each batch.
        position: Number of batches drawn so far; counted before a batch is yielded.
    """

    def __init__(self, table: PromptTable, order: PromptOrder, position: int = 0) -> None:
        self.table, self.order, self.position = table, order, position

    def __len__(self) -> int:
        return self.order.n_batches

    def __iter__(self) -> Iterator[PromptBatch]:
        # always a full epoch: with Trainer.limit_train_batches the next one starts in the middle of the permutation
        for _ in range(len(self)):
            rows = self.order.rows(self.position)
            self.position += 1
            yield self.table.batch(rows.tolist())


class HeldOutPrompts(IterableDataset[PromptBatch]):
    """Batches of held-out prompts, in the order of the file."""

    def __init__(self, table: PromptTable, batch_size: int) -> None:
        self.table, self.batch_size = table, batch_size

    def __len__(self) -> int:
        return -(-len(self.table) // self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        for start in range(0, len(self.table), self.batch_size):
            yield self.table.batch(list(range(start, min(start + self.batch_size, len(self.table)))))
