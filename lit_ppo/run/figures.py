"""The first and the last values of a run's metrics."""

from copy import deepcopy
from typing import Any

import lightning as L

ENDS = 10  # values at the start and at the end of a run that are averaged, at most


def updates_done(trainer: L.Trainer) -> int:
    """Updates so far, those before a resume included; optimizer steps if Lightning takes them."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)  # type: ignore[attr-defined]


class Figures:
    """Collects the metrics of the progress bar after every update, and ``val/`` metrics after every validation.

    Attributes:
        done: Updates so far.
        held_out: The first and the last value of each metric on held-out data.
    """

    def __init__(self) -> None:
        self.done = 0
        self.held_out: dict[str, list[float]] = {}
        self._series: dict[str, list[float]] = {}  # the first and the last values

    def start(self, trainer: L.Trainer) -> None:
        """Count from the Trainer's updates on."""
        self.done = updates_done(trainer)

    def add_update(self, trainer: Any) -> None:
        """Take the metrics, unless this is in the middle of accumulated batches."""
        if updates_done(trainer) == self.done:
            return
        self.done = updates_done(trainer)
        for name, value in trainer.progress_bar_metrics.items():
            if not name.startswith("val/"):
                values = self._series.setdefault(name, [])
                values.append(float(value))
                del values[ENDS:-ENDS]

    def add_validation(self, trainer: Any) -> None:
        """Take the metrics on held-out data."""
        for name, value in {} if trainer.sanity_checking else trainer.callback_metrics.items():
            if name.startswith("val/"):
                self.held_out[name] = [*self.held_out.get(name, [])[:1], float(value)]

    @property
    def ends(self) -> int:
        """The number of values at each end that are averaged: a tenth of the updates, at most ten."""
        return min(ENDS, max(1, self.done // 10))

    def means(self) -> dict[str, list[float]]:
        """By metric, its mean at the start and at the end; one value where there is only one."""
        n = self.ends
        return {
            name: [sum(part) / len(part) for part in (values[:n], values[-n:])[2 - min(len(values), 2) :]]
            for name, values in self._series.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The values, for a checkpoint."""
        return deepcopy({"done": self.done, "series": self._series, "held_out": self.held_out})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The values of a checkpoint."""
        self.done = state_dict.get("done", 0)
        self._series, self.held_out = deepcopy(state_dict["series"]), deepcopy(state_dict["held_out"])
