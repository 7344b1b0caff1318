"""Callbacks and a logger that keep what they see."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor


class Spy(L.Callback):
    """A plain Lightning callback that keeps what it sees at one hook.

    Args:
        hook: Its name.
        look: Makes what is kept out of the module and the hook's arguments.
    """

    def __init__(self, hook: str, look: Callable[..., Any]) -> None:
        self.seen: list[Any] = []
        setattr(self, hook, lambda trainer, pl_module, *args: self.seen.append(look(pl_module, *args)))


TENSORBOARD = ("add_text", "add_histogram", "add_custom_scalars", "add_figure")


def drawn(figure: Any) -> dict[str, list[list[float]]]:
    """What a figure shows in its first axes: the points of each line, dot and outline by its label."""
    axes = figure.axes[0]
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    points |= {dots.get_label(): dots.get_offsets().tolist() for dots in axes.collections}
    return points | {outline.get_label(): outline.get_xy().tolist() for outline in axes.patches}


class Recorder(Logger):
    """Keeps everything that it is given to log, and is its own TensorBoard: (kind, tag, value, step) each.

    Args:
        folder: The run's.
        kinds: What else than numbers it takes.
    """

    name, version = "recorder", 0

    def __init__(self, folder: Path, kinds: Sequence[str] = TENSORBOARD) -> None:
        super().__init__()
        self.folder, self.kinds = folder, kinds
        self.calls: list[tuple[str, str, Any, int | None]] = []

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(**{kind: partial(self.take, kind) for kind in self.kinds})

    def take(self, kind: str, tag: Any, value: Any = None, step: int | None = None) -> None:
        plain = drawn(value) if kind == "add_figure" else value.tolist() if isinstance(value, Tensor) else value
        self.calls.append((kind, tag, plain, step))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls += [("scalar", tag, value, step) for tag, value in metrics.items() if tag != "epoch"]

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            self.calls.append(("hparams", str(params), [*args, kwargs], None))

    def of(self, kind: str) -> list[tuple[str, Any, int | None]]:
        """What was logged of a kind: (tag, value, step)."""
        return [(tag, value, step) for one, tag, value, step in self.calls if one == kind]


class Attach(L.Callback):
    """Gives the trainer a logger that takes everything, and writes on the first process what it was given."""

    def __init__(self, folder: Path) -> None:
        self.logger, self.file = Recorder(folder), folder / "recorded.pt"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.loggers = [*trainer.loggers, self.logger]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            torch.save(self.logger.calls, self.file)
