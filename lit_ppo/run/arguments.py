"""Checks of the Trainer's arguments and of the command's options, before anything is built.

Lightning accepts some values without a word that make no sense (``log_every_n_steps=-1`` logs nothing) and fails on
others in the run, in words that name no argument.
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lit_ppo.validate import integer, non_negative, one_of, refuse

OWNER = "Trainer"
MOST_DEVICES = 1024  # of one node
TIME = "must be a time above 0: 'DD:HH:MM:SS', or a mapping such as {hours: 2}"
AT_LEAST = {  # integers; -1 is without bound
    "max_epochs": -1,
    "max_steps": -1,
    "num_sanity_val_steps": -1,
    "min_epochs": 0,
    "min_steps": 0,
    "log_every_n_steps": 0,
    "reload_dataloaders_every_n_epochs": 0,
    "check_val_every_n_epoch": 1,
    "accumulate_grad_batches": 1,
    "num_nodes": 1,
}
NEEDED = ("max_steps", "accumulate_grad_batches", "num_nodes", "reload_dataloaders_every_n_epochs", "default_root_dir")
CHOICES = {"gradient_clip_algorithm": ("norm", "value"), "profiler": ("simple", "advanced", "pytorch", "xla")}


def check_trainer(given: Mapping[str, Any], *, trains: bool) -> None:
    """Check the arguments of the Trainer.

    Args:
        given: All arguments by name.
        trains: Whether the Trainer is to train.

    Raises:
        ValueError: Names the argument, its value and what is allowed.
    """
    arguments = {name: value for name, value in given.items() if value is not None or name in NEEDED}
    for name, value in arguments.items():
        if name in AT_LEAST:
            integer(OWNER, name, value, at_least=AT_LEAST[name])
        elif name in CHOICES and isinstance(value, str):
            one_of(OWNER, name, value, CHOICES[name])
        elif name.startswith("limit_") or name == "overfit_batches":
            _batches(name, value)
    for name in ("epochs", "steps"):
        least, most = arguments.get(f"min_{name}") or 0, arguments.get(f"max_{name}", -1)
        if -1 < most < least:
            refuse(OWNER, f"min_{name}", least, f"must be at most max_{name}={most}")
    if trains and arguments.get("limit_train_batches", 1) == 0:
        refuse(OWNER, "limit_train_batches", 0, "trains nothing; leave it out, or use lit-ppo validate")
    if "gradient_clip_val" in arguments:
        non_negative(OWNER, "gradient_clip_val", arguments["gradient_clip_val"])
    if "max_time" in arguments:
        _time("max_time", arguments["max_time"])
    if "val_check_interval" in arguments:
        _interval("val_check_interval", arguments["val_check_interval"])
    if not isinstance(arguments.get("fast_dev_run", False), bool):
        integer(OWNER, "fast_dev_run", arguments["fast_dev_run"], at_least=0)
    _devices(arguments.get("devices", "auto"))
    root = arguments.get("default_root_dir")
    if root is None or not _names_something(root):
        refuse(OWNER, "default_root_dir", root, "names no folder; give a path, such as runs")


def check_command(given: Any) -> None:
    """Check ``--seed_everything`` and ``--data_root``.

    Raises:
        ValueError: Names the option, its value and what is allowed.
    """
    seed, root = given.seed_everything, given.data_root
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        raise ValueError(f"--seed_everything {seed}: must be from 0 to {2**32 - 1}; false sets no seed")
    if root is not None and not _names_something(root):
        raise ValueError(f"--data_root {root!r}: names no folder; give its path, or leave it out")


def _names_something(path: Any) -> bool:
    return bool(str(path).strip()) and "\0" not in str(path)


def _batches(name: str, value: Any) -> None:
    """A number of batches, or a fraction of them."""
    if isinstance(value, float):
        if not 0 <= value <= 1:
            refuse(OWNER, name, value, "must be a number of batches, as an integer, or a fraction from 0.0 to 1.0")
    else:
        integer(OWNER, name, value, at_least=0)


def _interval(name: str, value: Any) -> None:
    """Batches between two validations, a fraction of an epoch, or a time."""
    if isinstance(value, float):
        if not 0 < value <= 1:
            problem = (
                "must be a number of batches, as an integer from 1 on, a fraction of an epoch above 0.0, or a time"
            )
            refuse(OWNER, name, value, f"{problem}; null validates at the end of each epoch")
    elif isinstance(value, int):
        integer(OWNER, name, value, at_least=1)
    else:
        _time(name, value)


def _time(name: str, value: Any) -> None:
    duration = value
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", value.strip())):
        days, hours, minutes, seconds = map(int, match.groups())
        duration = _duration(days=days, hours=hours, minutes=minutes, seconds=seconds)
    elif isinstance(value, Mapping):
        duration = _duration(**value)
    if not isinstance(duration, timedelta) or duration <= timedelta(0):
        refuse(OWNER, name, value, TIME)


def _duration(**parts: Any) -> timedelta | None:
    try:
        return timedelta(**parts)
    except (TypeError, ValueError, OverflowError):
        return None


def _devices(value: Any) -> None:
    """A number of devices, -1 for all, or the ids of some."""
    ids = value if isinstance(value, list) else str(value).split(",")
    numbers = [int(entry) for entry in ids if re.fullmatch(r"\s*-?\d{1,9}\s*", str(entry))]
    listed = isinstance(value, list) or len(ids) > 1
    valid = len(numbers) == len(ids) > 0 and not isinstance(value, bool)
    if listed:
        valid = valid and min(numbers) >= 0
    elif valid:
        valid = numbers[0] == -1 or 1 <= numbers[0] <= MOST_DEVICES
    if value != "auto" and not valid:
        problem = f"must be 'auto', -1 for all, a number from 1 to {MOST_DEVICES}, or a list of ids such as [0, 1]"
        refuse(OWNER, "devices", value, problem)
