"""Learning rates, other options and schedules given to a resumed run: Lightning would keep the checkpoint's."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch.optim import Optimizer


@dataclass
class BuiltOptimizer:
    """An optimizer as the configuration in force makes it, before its first step.

    Args:
        where: Class and argument that it was given as, such as ``LitPPO(actor_optimizer``, for messages.
        optimizer: Just made.
        make_schedule: Makes its schedule; None: the rate stays.
    """

    where: str
    optimizer: Optimizer
    make_schedule: Callable[[Optimizer], Any] | None

    def __post_init__(self) -> None:
        self.options = [_options(group) for group in self.optimizer.param_groups]  # a schedule changes them
        self.schedule: Any = None if self.make_schedule is None else self.make_schedule(self.optimizer)
        self.settings = {
            "class": _name(self.optimizer),
            "options": self.options,
            "schedule": None if self.schedule is None else _name(self.schedule),
            "schedule_state": {} if self.schedule is None else _plain(self.schedule.state_dict()),
        }

    def take_effect(self, trainer: L.Trainer, saved: dict[str, Any], steps: int) -> None:
        """Put these settings in force where they are not those that the checkpoint was written under.

        Rate and schedule are then what they would be had the run been started with them.

        Args:
            trainer: Its states are restored.
            saved: The settings in the checkpoint.
            steps: Steps that the schedule has done.

        Raises:
            ValueError: The optimizer is of another class, to which the saved states mean nothing.
        """
        if saved == self.settings:
            return
        if saved["class"] != self.settings["class"]:
            raise ValueError(
                f"{self.where}={self.settings['class']}): the checkpoint holds the states of {saved['class']}; restore "
                "that, or start a new run from the exported model"
            )
        for group, options in zip(self.optimizer.param_groups, self.options, strict=True):
            for name in group.keys() - options.keys() - {"params"}:
                del group[name]  # such as initial_lr: a schedule's own
            group.update(options)
        if self.make_schedule is None:
            return
        (place,) = [config for config in trainer.lr_scheduler_configs if config.scheduler is self.schedule]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps without optimizer steps between them
            place.scheduler = self.schedule = self.make_schedule(self.optimizer)
            for _ in range(steps):
                self.schedule.step()


def restore_settings(
    trainer: L.Trainer, built: dict[str, BuiltOptimizer], saved: dict[str, Any], states: list[Any], steps: int
) -> None:
    """After a resume: have the configuration's optimizers and schedules take effect.

    Args:
        trainer: Its optimizers' and schedules' states are restored.
        built: By name.
        saved: Settings by name, from the checkpoint.
        states: Of the schedules, from the checkpoint, in the order of ``saved``.
        steps: Steps done, for a schedule that the saved run did not have.
    """
    remaining = iter(states)
    by_name = {name: next(remaining, None) for name, settings in saved.items() if settings["schedule"]}
    for name, optimizer in built.items():
        state = by_name.get(name)
        if state is not None and saved[name]["schedule"] == optimizer.settings["schedule"]:
            optimizer.schedule.load_state_dict(state)  # Lightning goes by position, and one may have come or gone
        if name in saved:
            optimizer.take_effect(trainer, saved[name], steps if state is None else int(state["last_epoch"]))


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def _plain(state: Any) -> Any:
    """What of a schedule's state can be saved and compared."""
    if isinstance(state, dict):
        return {str(name): _plain(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [_plain(value) for value in state]
    return state if state is None or isinstance(state, bool | int | float | str) else None


def _name(thing: object) -> str:
    return type(thing).__qualname__
