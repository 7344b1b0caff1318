"""LitPPO trained for some updates, and what each hook handed over."""

from pathlib import Path
from typing import Any

import lightning as L

from tests.helpers.toys import make_data, make_module, make_trainer


class Recorder(L.Callback):
    """Keeps what each hook handed over."""

    def __init__(self) -> None:
        self.experiences: list[Any] = []
        self.minibatches: list[list[int]] = []
        self.metrics: list[dict[str, float]] = []

    def on_minibatch_start(self, trainer: Any, pl_module: Any, minibatch: Any) -> None:
        self.minibatches.append(minibatch.group.tolist())

    def on_minibatch_end(self, trainer: Any, pl_module: Any, experience: Any, metrics: dict[str, float]) -> None:
        self.metrics.append(dict(metrics))

    def on_update_end(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        self.experiences.append(experience)


def record(
    folder: Path, actor: Path, *callbacks: L.Callback, max_steps: int = 2, **overrides: Any
) -> tuple[Any, Recorder, Any]:
    recorder = Recorder()
    module = make_module(actor, **overrides)
    trainer = make_trainer(folder, callbacks=[*callbacks, recorder], max_steps=max_steps)
    trainer.fit(module, make_data(folder))
    return module, recorder, trainer


def rows_of(experience: Any) -> list[tuple[list[int], list[int]]]:
    fields = (experience.prompt_ids, experience.prompt_mask, experience.response_ids, experience.response_mask)
    return [(p[m].tolist(), r[n].tolist()) for p, m, r, n in zip(*fields, strict=True)]
