"""A callback that measures the actor along a run: score, judge's score and exact KL on held-out prompts."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.learning.task import N_PROMPTS, held_out_prompts, make_scorer, measure
from lit_ppo.functional import moving_average


def copied(model: torch.nn.Module) -> list[torch.Tensor]:
    """A copy of the weights."""
    return [weight.detach().clone() for weight in model.parameters()]


@contextlib.contextmanager
def holding(model: torch.nn.Module, weights: list[torch.Tensor] | None) -> Iterator[None]:
    """Give the model other weights for a while; None keeps its own."""
    if weights is None:
        yield
        return
    own = copied(model)
    _set(model, weights)
    try:
        yield
    finally:
        _set(model, own)


@torch.no_grad()
def _set(model: torch.nn.Module, weights: list[torch.Tensor]) -> None:
    for weight, new in zip(model.parameters(), weights, strict=True):
        weight.copy_(new)


def monitors(trainer: L.Trainer) -> list[Any]:
    """The callbacks that keep their warnings."""
    return [callback for callback in trainer.callbacks if hasattr(callback, "told")]  # type: ignore[attr-defined]


class Frontier(L.Callback):
    """Measures the actor, and averages of its weights, at some updates, and stores all in a file.

    The KL is that to the reference of the start, also where a callback moves the reference. With each point are the
    warnings of monitors so far. The time of measuring is not part of the run's seconds.

    Args:
        output: JSON file.
        folder: Of the checkpoints.
        data_root: Of the film reviews.
        updates: After which updates to measure; 0: before the first.
        averages: Decays of exponential averages of the weights after each update, measured beside the weights.
        samples: Responses per held-out prompt.
        prompts: Held-out prompts.
    """

    def __init__(
        self,
        output: str,
        folder: str,
        data_root: str,
        updates: list[int],
        averages: list[float] | None = None,
        samples: int = 16,
        prompts: int = N_PROMPTS,
    ) -> None:
        self.output, self.folder, self.data_root = Path(output), Path(folder), Path(data_root)
        self.updates, self.samples, self.n_prompts = set(updates), samples, prompts
        self.averaged: dict[float, list[torch.Tensor]] = {decay: [] for decay in averages or []}
        self.points: list[dict[str, Any]] = []
        self.reference: list[torch.Tensor] | None = None  # at the start, if it moves
        self.seconds = self.cpu_seconds = 0.0
        self.episodes = self.done = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.judge, self.prompts = make_scorer(self.folder, "judge"), held_out_prompts(self.data_root, self.n_prompts)
        if pl_module.checkpoint_reference:
            self.reference = copied(pl_module.reference)
        for decay in self.averaged:
            self.averaged[decay] = copied(pl_module.actor)
        if 0 in self.updates:
            self._measure(pl_module, None, {})

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter(), time.process_time()

    def on_rollout_end(self, trainer: L.Trainer, pl_module: Any, experience: Any) -> None:
        self.episodes += len(experience.response_ids)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds += time.perf_counter() - self._started[0]
        self.cpu_seconds += time.process_time() - self._started[1]
        self.done += 1
        if not pl_module.actor_frozen:
            for decay, weights in self.averaged.items():
                for mean, weight in zip(weights, pl_module.actor.parameters(), strict=True):
                    mean.copy_(moving_average(mean, weight, decay))
        if self.done in self.updates:
            told = {type(callback).__name__: list(callback.told) for callback in monitors(trainer)}
            with holding(pl_module.reference, self.reference):
                self._measure(pl_module, None, told)
                for decay, weights in self.averaged.items():
                    with holding(pl_module.actor, weights):
                        self._measure(pl_module, decay, told)

    def _measure(self, pl_module: Any, decay: float | None, told: dict[str, list[str]]) -> None:
        measured = measure(pl_module, self.judge, self.prompts, self.samples)
        self.points.append(
            {
                "update": self.done,
                "episodes": self.episodes,
                "average": decay,
                **{name: round(value, 4) for name, value in measured._asdict().items()},
                "seconds": round(self.seconds, 1),
                "cpu_seconds": round(self.cpu_seconds, 1),
                "told": told,
            }
        )
        print(json.dumps(self.points[-1]), flush=True)
        self.output.write_text(json.dumps(self.points, indent=1))
