"""Start with easy prompts."""

from typing import Any

import lightning as L
import torch

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require_weighted_rows
from lit_ppo.constructor import constructor
from lit_ppo.functional import linear_schedule
from lit_ppo.validate import fraction, integer, text


class CurriculumSampling(PPOCallback):
    """Draws prompts from the easiest part of the data set, which grows until it is the full data set.

    Use it when most prompts are too hard at first to earn any reward, and the data set says how hard each one is.
    Afterwards every prompt is seen once per epoch again. An update has fewer prompts while fewer than one batch are
    available. Costs nothing. Needs a ``PromptDataModule``.

    Args:
        column: Column with the difficulty of each prompt: finite numbers, smaller is easier; only their order matters.
            Of equally hard prompts, the earlier one in the file is taken as easier.
        updates: Updates in which the part grows to the full data set, linearly.
        start: Fraction of the prompts available to the first update.

    Reads ``trainer.datamodule.columns``; writes ``trainer.datamodule.set_weights``. Logs ``data/drawable_fraction``,
    the fraction available to the update.
    Source: Bengio et al. 2009, "Curriculum learning", ICML; Platanios et al. 2019, arXiv:1903.09848
    (linear competence).
    """

    @constructor
    def __init__(self, column: str, updates: int, start: float = 0.2) -> None:
        self.column = text(self, "column", column)
        self.updates = integer(self, "updates", updates)
        self.start = fraction(self, "start", start)
        self._done = 0
        self._easy_first: list[int] = []
        self._has_set_weights = False  # in this fit

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, CurriculumSampling, why="both would set the sampling weights")
        if stage == "fit":
            difficulty = self._difficulty(require_weighted_rows(self, trainer, pl_module, "columns").columns)
            self._easy_first = sorted(range(len(difficulty)), key=difficulty.__getitem__)  # stable: ties stay in order

    def _difficulty(self, columns: dict[str, list[Any]]) -> list[float]:
        where, known = f"CurriculumSampling(column={self.column!r})", ", ".join(map(repr, columns)) or "none"
        if self.column not in columns:
            raise ValueError(f"{where}: the data set has no such column; besides the prompt it has {known}")
        return [_number(where, known, row, value) for row, value in enumerate(columns[self.column])]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._set_weights(trainer)

    def restore(self, pl_module: Any) -> None:
        if self._has_set_weights:
            pl_module.trainer.datamodule.set_weights(None)
        self._has_set_weights = False

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        pl_module.log("data/drawable_fraction", self._share())
        self._done += 1
        self._set_weights(trainer)

    def _share(self) -> float:
        return linear_schedule(self.start, 1.0, self._done, self.updates)

    def _set_weights(self, trainer: Any) -> None:
        if self._done > self.updates:  # later, another callback may set the weights
            return
        weights = None
        if self._done < self.updates:
            weights = torch.zeros(len(self._easy_first))
            n_drawable = int(len(weights) * self._share() + 1.0 - 1e-6)  # rounded up, except for rounding errors
            weights[self._easy_first[:n_drawable]] = 1.0
        trainer.datamodule.set_weights(weights)
        self._has_set_weights = True

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = state_dict["done"]


def _number(where: str, known: str, row: int, value: Any) -> float:
    try:
        number = float(value)  # a CSV file's columns are text
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise ValueError(
            f"{where}: row {row} has {value!r}, not a finite number; besides the prompt the columns are {known}"
        )
    return number
