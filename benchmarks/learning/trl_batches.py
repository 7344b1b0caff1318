"""What TRL's PPOTrainer is handed in the place of its own: batches of prompts, and a reward model that averages."""

from collections.abc import Iterator
from typing import Any

import torch


class MeanOverResponse(torch.nn.Module):
    """In the place of a classifier's head: the mean of the scores from the response's start to each token.

    TRL reads a reward model at the response's last token; there, this is the mean over the response.
    """

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head, self.start = head, 0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        scores = self.head(states)
        response = scores[:, self.start :].float()
        counts = torch.arange(1, response.shape[1] + 1, device=response.device)[None, :, None]
        return torch.cat([scores[:, : self.start].float(), response.cumsum(1) / counts], dim=1)


class Batches:
    """The prompts of each update, padded; says where responses start.

    Args:
        batches: Token ids of each prompt of each update.
        tokenizer: Pads.
        head: Of the reward model, where it averages.
    """

    def __init__(self, batches: list[list[list[int]]], tokenizer: Any, head: Any) -> None:
        self.batches, self.tokenizer, self.head = batches, tokenizer, head

    def __iter__(self) -> Iterator[Any]:
        for ids in self.batches:
            batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
            if isinstance(self.head, MeanOverResponse):
                self.head.start = batch["input_ids"].shape[1]
            yield batch
