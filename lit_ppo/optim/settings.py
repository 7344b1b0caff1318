"""Apply the current configuration's learning rates, options and schedules to a resumed run.

Lightning alone restores those of the checkpoint.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_ppo.optim.schedules import per_step
from lit_ppo.shown import message_of, written
from lit_ppo.validate import factory

FUSED_ON = ("cuda",)


@dataclass
class BuiltOptimizer:
    """An optimizer and its schedule as the current configuration creates them.

    Args:
        where: Class and argument of the optimizer, such as ``LitPPO(actor_optimizer``, for messages.
        optimizer: The optimizer before its first step.
        make_schedule: From optimizer to schedule; None: a constant learning rate.
    """

    where: str
    optimizer: Optimizer
    make_schedule: Callable[[Optimizer], Any] | None

    def __post_init__(self) -> None:
        self.options = [_options(group) for group in self.optimizer.param_groups]  # before a schedule changes them
        for name, value in (item for options in self.options for item in options.items()):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{self.where}={_name(self.optimizer)}): {name}={value} must be a finite number")
        self.schedule: Any = None if self.make_schedule is None else self.make_schedule(self.optimizer)
        self.settings = {
            "class": _name(self.optimizer),
            "options": self.options,
            "schedule": None if self.schedule is None else _name(self.schedule),
            "schedule_state": {} if self.schedule is None else _plain(self.schedule.state_dict()),
        }

    def check_steps_alone(self) -> None:
        """Refuse an optimizer whose step computes the loss itself, or takes only sparse gradients.

        Raises:
            ValueError: Names the argument.
        """
        closure = inspect.signature(self.optimizer.step).parameters.get("closure")
        if isinstance(self.optimizer, torch.optim.SparseAdam):
            problem = "takes only sparse gradients, which these models do not have"
        elif closure is not None and closure.default is inspect.Parameter.empty:
            problem = "computes the loss several times in a step, by a closure that PPO's minibatches do not have"
        else:
            return
        raise ValueError(f"{self.where}={_name(self.optimizer)}): {problem}; use another, such as torch.optim.AdamW")

    def take_effect(self, trainer: L.Trainer, saved: dict[str, Any], steps: int) -> None:
        """Apply these settings if they differ from the checkpoint's.

        Learning rate and schedule are then as if the run had started with these settings.

        Args:
            trainer: A trainer that has restored its states.
            saved: The checkpoint's settings.
            steps: Steps that the schedule has done.

        Raises:
            ValueError: The optimizer's class has changed, so the saved states do not fit.
        """
        if saved == self.settings:
            return
        if saved["class"] != self.settings["class"]:
            raise ValueError(
                f"{self.where}={self.settings['class']}): the checkpoint holds the states of {saved['class']}; use "
                f"{saved['class']}, or start a new run from the exported model"
            )
        for group, options, before in zip(self.optimizer.param_groups, self.options, saved["options"], strict=True):
            for name in group.keys() - options.keys() - {"params"}:
                if not isinstance(group[name], Tensor):  # a count of steps
                    del group[name]  # such as initial_lr, which a schedule adds
            for name, value in options.items():
                decided = (value is None or isinstance(value, bool)) and name in before and before[name] == value
                if isinstance(group.get(name), Tensor):
                    group[name].fill_(value)
                elif not decided:  # the optimizer may have decided since
                    group[name] = value
        move_steps(self.optimizer)
        if self.make_schedule is None:
            return
        (place,) = [config for config in trainer.lr_scheduler_configs if config.scheduler is self.schedule]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scheduler steps without optimizer steps
            place.scheduler = self.schedule = self.make_schedule(self.optimizer)
            for _ in range(steps):
                self.schedule.step()


def checked_factories(owner: object, factories: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """The arguments ``..._optimizer`` and ``..._scheduler`` of a module, which make both later.

    Args:
        owner: The module.
        factories: From the first part of their names, perhaps empty, to optimizer and scheduler; the latter or None.
    """
    checked = {}
    for name, (optimizer, scheduler) in factories.items():
        prefix = f"{name}_" if name else ""
        factory(owner, f"{prefix}optimizer", optimizer, "lambda parameters: torch.optim.AdamW(parameters, lr=1e-5)")
        if scheduler is not None:
            factory(owner, f"{prefix}scheduler", scheduler, "lambda optimizer: WarmupCosine(optimizer, 10)")
        checked[name] = Default.of(owner, f"{prefix}optimizer", optimizer), scheduler
    return checked


@dataclass(frozen=True)
class Default:
    """The default of a constructor's argument, a lambda, which is found by its place where pickle needs it."""

    cls: type
    argument: str

    def __call__(self, given: Any) -> Any:
        return _default(self.cls, self.argument)(given)

    @classmethod
    def of(cls, owner: object, argument: str, value: Any) -> Any:
        """The value of an argument; as a default of this kind if it is the one of a class of the owner."""
        found = (c for c in type(owner).__mro__ if "__init__" in vars(c) and _default(c, argument) is value)
        home = next(found, None)
        return value if home is None else cls(home, argument)


def _default(cls: Any, argument: str) -> Any:
    parameter = inspect.signature(cls.__init__).parameters.get(argument)
    return None if parameter is None else parameter.default


def build_optimizer(
    module: L.LightningModule,
    prefix: str,
    parameters: Iterable[nn.Parameter],
    make: OptimizerCallable,
    make_schedule: LRSchedulerCallable | None,
) -> BuiltOptimizer:
    """The optimizer and the schedule of one model.

    Args:
        module: The module that trains the model.
        prefix: Of the module's arguments, such as ``actor_`` for ``actor_optimizer`` and ``actor_scheduler``.
        parameters: To optimize.
        make: From parameters to optimizer.
        make_schedule: From optimizer to schedule; None: a constant learning rate.
    """
    where = f"{type(module).__name__}({prefix}"

    def schedule(optimizer: Optimizer) -> Any:
        assert make_schedule is not None
        return per_step(f"{where}scheduler", _made(f"{where}scheduler", make_schedule, optimizer, LRScheduler), module)

    optimizer = make_optimizer(f"{where}optimizer", make, parameters)
    use_fused(optimizer)
    return BuiltOptimizer(f"{where}optimizer", optimizer, None if make_schedule is None else schedule)


def make_optimizer(where: str, make: OptimizerCallable, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer of a user's function.

    Args:
        where: Class and argument, such as ``LitPPO(actor_optimizer``, for messages.
        make: From parameters to optimizer.
        parameters: To optimize.

    Raises:
        ValueError: The function fails, or makes something else.
    """
    optimizer: Optimizer = _made(where, make, parameters, Optimizer)
    return optimizer


def use_fused(optimizer: Optimizer) -> None:
    """Let torch's Adam and AdamW step in one kernel on a GPU, unless the user has chosen how they step.

    Args:
        optimizer: Before its first step.
    """
    ways = ("fused", "foreach", "capturable", "differentiable")
    for group in optimizer.param_groups if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) else []:
        is_chosen = any(group.get(way) not in (None, False) for way in ways) or False in (
            group["fused"],
            group["foreach"],
        )
        if not is_chosen and all(p.device.type in FUSED_ON and p.is_floating_point() for p in group["params"]):
            group["fused"] = True


def move_steps(optimizer: Optimizer) -> None:
    """Put the numbers of steps of a fused optimizer where its kernel reads them; a checkpoint may come from another."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else []:
            step = optimizer.state.get(parameter, {}).get("step")
            if step is not None:
                optimizer.state[parameter]["step"] = torch.as_tensor(step).to(parameter.device, torch.float32)


def _made(where: str, make: Callable[[Any], Any], argument: Any, kind: Any) -> Any:
    """What the user's function makes, with errors that name the argument."""
    try:
        made = make(argument)
    except (TypeError, ValueError) as error:
        if str(error).startswith("WarmupCosine("):
            raise
        raise ValueError(f"{where}): {message_of(error)}; correct its arguments") from error
    if not isinstance(made, kind):
        raise ValueError(f"{where}): makes {written(made)}; it must return a torch {kind.__name__}")
    return made


def restore_settings(
    trainer: L.Trainer,
    built: dict[str, BuiltOptimizer],
    saved: dict[str, Any],
    states: list[Any],
    steps: Mapping[str, int],
) -> None:
    """Apply the current optimizers and schedules after a resume.

    Args:
        trainer: A trainer that has restored its states.
        built: The current optimizers by name.
        saved: The checkpoint's settings by name.
        states: The checkpoint's schedule states, in the order of ``saved``.
        steps: Steps done of each by name, for a schedule that the saved run did not have.
    """
    remaining = iter(states)
    by_name = {name: next(remaining, None) for name, settings in saved.items() if settings["schedule"]}
    for name, optimizer in built.items():
        state = by_name.get(name)
        if state is not None and saved[name]["schedule"] == optimizer.settings["schedule"]:
            # Lightning matches by position, which shifts if a schedule is added or removed
            optimizer.schedule.load_state_dict(state)
        if name in saved:
            done = steps[name] if state is None else int(state.get("last_epoch", steps[name]))
            optimizer.take_effect(trainer, saved[name], done)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    # torchao keeps the learning rate in a tensor
    return {n: x.item() if isinstance(x, Tensor) and x.ndim == 0 else x for n, x in options.items()}


def _plain(state: Any) -> Any:
    """The plain values in a schedule's state, which can be saved and compared; None for others."""
    if isinstance(state, dict):
        return {str(name): _plain(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [_plain(value) for value in state]
    return state if state is None or isinstance(state, bool | int | float | str) else None


def _name(thing: object) -> str:
    return type(thing).__qualname__
