"""A callback that measures the actor along a run: score, judge's score and exact KL on held-out prompts."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.learning.task import N_PROMPTS, held_out_prompts, make_scorer, measure
from lit_ppo.functional import moving_average


class Frontier(L.Callback):
    """Measures the actor, and averages of its weights, at some updates, and stores all in a file.

    The time of measuring is not part of the run's seconds.

    Args:
        output: JSON file.
        folder: Of the checkpoints.
        data_root: Of the film reviews.
        updates: After which updates to measure.
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
        self.seconds = self.cpu_seconds = 0.0
        self.episodes = self.done = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.judge, self.prompts = make_scorer(self.folder, "judge"), held_out_prompts(self.data_root, self.n_prompts)
        for decay in self.averaged:
            self.averaged[decay] = [weight.detach().clone() for weight in pl_module.actor.parameters()]

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
            self._measure(pl_module, None)
            for decay, weights in self.averaged.items():
                own = [weight.clone() for weight in pl_module.actor.parameters()]
                self._set(pl_module, weights)
                self._measure(pl_module, decay)
                self._set(pl_module, own)

    def _set(self, pl_module: Any, weights: list[torch.Tensor]) -> None:
        for weight, new in zip(pl_module.actor.parameters(), weights, strict=True):
            weight.copy_(new)

    def _measure(self, pl_module: Any, decay: float | None) -> None:
        measured = measure(pl_module, self.judge, self.prompts, self.samples)
        self.points.append(
            {
                "update": self.done,
                "episodes": self.episodes,
                "average": decay,
                **{name: round(value, 4) for name, value in measured._asdict().items()},
                "seconds": round(self.seconds, 1),
                "cpu_seconds": round(self.cpu_seconds, 1),
            }
        )
        print(json.dumps(self.points[-1]), flush=True)
        self.output.write_text(json.dumps(self.points, indent=1))
