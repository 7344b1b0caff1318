"""Loggers in the shape of others' services: what they are handed they check as those do, and their experiments have
those services' methods alone."""

import json
import re
from types import SimpleNamespace
from typing import Any

from lightning.fabric.utilities.logger import (
    _convert_json_serializable,
    _convert_params,
    _flatten_dict,
    _sanitize_callable_params,
)
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment


class _Service(Logger):
    """A service that keeps its runs under names of its own.

    Args:
        save_dir: Folder of all runs; None where the service is elsewhere.
        run: Name of this one.
    """

    def __init__(self, save_dir: str | None = None, run: str = "1a2b3c") -> None:
        super().__init__()
        self.folder, self.run = save_dir, run
        self.rows: list[dict[str, float]] = []
        self.params: dict[str, Any] = {}

    name = "project"
    version = property(lambda self: self.run)
    save_dir = property(lambda self: self.folder)


class WandbLike(_Service):
    """W&B: ``experiment.log`` and ``experiment.config.update``; all else goes through them."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        config = SimpleNamespace(update=lambda params, allow_val_change: self.params.update(params))
        return SimpleNamespace(log=self._log, config=config, define_metric=lambda *a, **k: None, finish=lambda: None)

    def _log(self, row: dict[str, Any]) -> None:
        json.dumps(row)
        self.rows.append(row)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.experiment.log({**metrics, "trainer/global_step": step})

    def log_hyperparams(self, params: Any) -> None:
        params = _convert_json_serializable(_sanitize_callable_params(_convert_params(params)))
        self.experiment.config.update(params, allow_val_change=True)


class MlflowLike(_Service):
    """MLflow: ``experiment.log_batch`` with names of certain characters, parameters as short texts."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        return SimpleNamespace(log_batch=self._log_batch, set_terminated=lambda run_id, status: None)

    def _log_batch(self, run_id: str, metrics: dict[str, float] | None = None, params: Any = ()) -> None:
        for name in [*(metrics or ()), *dict(params)]:
            assert re.fullmatch(r"[/\w.\- :]+", name), name  # MLflow's own rule
        if metrics:
            self.rows.append({name: float(value) for name, value in metrics.items()})
        self.params.update({name: str(value)[:250] for name, value in dict(params).items()})

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.experiment.log_batch(run_id=self.version, metrics=metrics)

    def log_hyperparams(self, params: Any) -> None:
        self.experiment.log_batch(run_id=self.version, params=_flatten_dict(_convert_params(params)))
