"""Engines for tests: the actor's own decode loop behind the interface, exact or perturbed."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lit_ppo import Engine
from lit_ppo.generation.transformers import generate
from lit_ppo.models.load import load_causal_lm


class CopyEngine(Engine):
    """Samples with a second copy of the model, which gets its weights by ``sync``; notes what it is asked.

    Args:
        path: Of the model.
        temper: Divides its logits besides the temperature: another distribution than the one that is trained.
        lose: Called before each ``generate``; raises to play a lost program.
    """

    name = "copy"

    def __init__(self, path: str, temper: float = 1.0, lose: Callable[[], None] = lambda: None) -> None:
        self.model = load_causal_lm("engine", path, {}).eval()
        self.temper, self.lose = temper, lose
        self.calls: list[str] = []
        self.seeds: list[list[int] | None] = []

    @torch.no_grad()
    def generate(self, prompt_ids: list[list[int]], n: int, config: Any, seeds: list[int] | None) -> Any:
        self.calls.append("generate")
        self.lose()
        self.seeds.append(seeds)
        rows = [ids for ids in prompt_ids for _ in range(n)]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
        config = type(config)(**{**config.to_diff_dict(), "temperature": config.temperature * self.temper})
        draws = None if seeds is None else [(seed % 2**32, seed >> 32) for seed in seeds]
        sampled = generate(self.model, ids, mask, config, draws, logprobs=True)
        return sampled.ids, sampled.logprobs

    @torch.no_grad()
    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.calls.append("sync")
        own = dict(self.model.named_parameters())
        found = set()
        for name, tensor in weights:
            own[name].copy_(tensor)
            found.add(name)
        assert found == own.keys(), own.keys() ^ found

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")
