"""Arguments of the Trainer that Lightning accepts in silence, or refuses without their name."""

import inspect
from datetime import timedelta
from typing import Any

import lightning as L
import pytest

from lit_ppo.run.arguments import check_trainer

DEFAULTS = {name: p.default for name, p in inspect.signature(L.Trainer.__init__).parameters.items() if name != "self"}
NAN, INF = float("nan"), float("inf")
REFUSED: dict[str, list[Any]] = {
    "accumulate_grad_batches": [0, -1, None, 1.5, True],
    "check_val_every_n_epoch": [0, -1, 1.5],
    "default_root_dir": ["", "  ", "a\0b", None],
    "devices": [0, -2, "", "abc", [], [-1], "0,x", 1.5, NAN, 10**9, True],
    "fast_dev_run": [-1, 1.5],
    "gradient_clip_algorithm": ["", "abc"],
    "gradient_clip_val": [-1, NAN, INF],
    "limit_predict_batches": [-1, 1.5, NAN],
    "limit_test_batches": [-0.5, INF],
    "limit_train_batches": [0, 0.0, -1, 1.5, NAN],
    "limit_val_batches": [-1, 1.5, NAN],
    "log_every_n_steps": [-1, 1.5, NAN, True],
    "max_epochs": [-2, 1.5],
    "max_steps": [-2, None, NAN],
    "max_time": ["abc", "", "12:00", "-1:00:00:00", "00:00:00:00", {}, {"hours": -1}, {"foo": 1}, {"days": 1e300}, 5],
    "min_epochs": [-1, 9],
    "min_steps": [-1, 9],
    "num_nodes": [0, -1, None],
    "num_sanity_val_steps": [-2],
    "overfit_batches": [-1, 1.5, NAN],
    "profiler": ["", "abc"],
    "reload_dataloaders_every_n_epochs": [-1, None],
    "val_check_interval": [0, -1, 0.0, -0.5, 1.5, NAN, INF, "abc", "", {"foo": 1}, timedelta(0)],
}
ACCEPTED: dict[str, list[Any]] = {
    "default_root_dir": ["runs", "."],
    "devices": ["auto", -1, 2, "2", "0,1", [0], [0, 3]],
    "fast_dev_run": [True, False, 3],
    "gradient_clip_val": [None, 0, 1.0],
    "limit_train_batches": [None, 1, 1.0, 0.5],
    "limit_val_batches": [0, 0.0, 1.0, 100],
    "log_every_n_steps": [0, 1, None],
    "max_epochs": [-1, 0, None],
    "max_steps": [-1, 0],
    "max_time": [None, "00:12:00:00", {"hours": 2}, timedelta(seconds=1)],
    "num_sanity_val_steps": [-1, 0],
    "val_check_interval": [None, 1, 1.0, 0.001, 500, "00:01:00:00", {"minutes": 5}],
}


def check(**arguments: Any) -> None:
    usual = {"default_root_dir": "runs", "max_epochs": 8, "max_steps": 8}
    check_trainer({**DEFAULTS, **usual, **arguments}, trains=True)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]], ids=str)
def test_a_value_without_meaning_is_refused_with_its_argument(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^Trainer\({name}=.*\): (must|names no|trains nothing)"):
        check(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in ACCEPTED for value in ACCEPTED[name]], ids=str)
def test_values_that_lightning_documents_are_accepted(name: str, value: Any) -> None:
    check(**{name: value})


def test_only_training_needs_batches_to_train_on() -> None:
    check_trainer({**DEFAULTS, "default_root_dir": "runs", "limit_train_batches": 0}, trains=False)
