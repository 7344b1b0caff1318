"""How ranks are started: on a port that is kept open until they use it; or as processes to which all is sent."""

import functools
import inspect
import io
import os
from collections.abc import Callable, Iterator
from multiprocessing.queues import Queue
from multiprocessing.reduction import ForkingPickler
from multiprocessing.synchronize import SemLock
from types import MethodType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import Strategy, StrategyRegistry, ddp
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lit_ppo.parallel.lost_ranks import WatchingLauncher
from lit_ppo.shown import reason
from lit_ppo.validate import refuse


class ReservedPort(LightningEnvironment):
    """Lightning's environment, with a port that no other run on the machine can take.

    Lightning chooses a free port, closes it, and opens it again after the launch: a second run can take it in
    between. This environment lets PyTorch's store listen on a port that the operating system chooses, and rank 0 then
    uses the same store. Rank 0 must be the launching process, as under ``ddp`` and ``fsdp2``, but not ``ddp_spawn``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._store: TCPStore | None = None

    @property
    def main_port(self) -> int:
        if self._store is None and "MASTER_PORT" not in os.environ:
            # multi_tenant: init_process_group of this process looks the store up by its port
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
            self._main_port = self._store.port
        return super().main_port


def reserve_port(strategy: Strategy) -> None:
    """Give a strategy a :class:`ReservedPort` and a watching launcher if it starts the other ranks as subprocesses.

    Args:
        strategy: Set up by a Trainer. It stays as it is if something else starts its processes, such as torchrun.
    """
    launcher = strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    given = launcher.cluster_environment
    if type(given) is LightningEnvironment and not given.creates_processes_externally:
        reserved = ReservedPort()
        reserved.set_world_size(given.world_size())
        strategy.cluster_environment = reserved  # type: ignore[attr-defined]
        strategy._launcher = WatchingLauncher(reserved, launcher.num_processes, launcher.num_nodes)


def check_starts_commands(strategy: Any) -> None:
    """Check that a strategy starts other ranks by the command that has started this process.

    Args:
        strategy: Of the Trainer's configuration: its name, or class and arguments.

    Raises:
        ValueError: It sends them objects instead.
    """
    named = isinstance(strategy, str)
    arguments = getattr(strategy, "init_args", {})
    if named and strategy in StrategyRegistry:
        arguments = StrategyRegistry[strategy]["init_params"]
    method = arguments.get("start_method", "popen")
    if method != "popen":
        problem = f"starts processes by {method!r}, which lit-ppo cannot report on, stop or resume; use 'ddp'"
        refuse("Trainer", "strategy", strategy if named else strategy.class_path, problem)


class SpawningLauncher(_MultiProcessingLauncher):
    """Starts ranks as Lightning does under ``ddp_spawn``, and names the argument that cannot be sent to them."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.procs = []
        try:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        except Exception:
            if trainer is not None and not self.procs:  # none was started
                check_can_be_sent(trainer.lightning_module, *trainer.callbacks, *trainer.loggers, *args)
            raise


ddp._MultiProcessingLauncher = SpawningLauncher  # type: ignore  # DDPStrategy takes it for ddp_spawn


def check_can_be_sent(*owners: object) -> None:
    """Check that pickle can send some objects to another process.

    Raises:
        ValueError: Names the class and the argument that it cannot.
    """
    for owner in owners:
        found = _unsent(owner)
        if found is not None:
            path, value, error = found
            advice = (
                "define functions at the top level of a module, open files where they are used, or use strategy='ddp'"
            )
            problem = f"cannot be sent to the processes that this strategy starts ({reason(error)}); {advice}"
            refuse(owner, _argument(owner, path), value, problem)


class _Probe(ForkingPickler):
    """Pickles what is sent, without that for which other processes have ways of their own."""

    def persistent_id(self, value: Any) -> str | None:
        return "other" if isinstance(value, torch.Tensor | SemLock | Queue | L.Trainer) else None


def _unsent(value: Any, depth: int = 20) -> tuple[list[str], Any, Exception] | None:
    """The innermost part of a value that cannot be pickled: where it is, itself, and the error."""
    try:
        _Probe(io.BytesIO()).dump(value)
    except Exception as error:
        for name, part in _parts(value) if depth else ():
            if (found := _unsent(part, depth - 1)) is not None:
                return [name, *found[0]], *found[1:]
        return [], value, error
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What pickle looks at inside a value, by name."""
    if isinstance(value, dict):
        yield from ((str(name), part) for name, part in value.items())
    elif isinstance(value, list | tuple | set):
        yield from ((str(number), part) for number, part in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from _parts({"func": value.func, "args": value.args, **value.keywords})
    elif isinstance(value, MethodType):
        yield "self", value.__self__
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not inspect.isfunction(value):
        state = value.__getstate__() if hasattr(value, "__getstate__") else vars(value)
        yield from _parts(state if isinstance(state, dict | tuple) else vars(value))


def _argument(owner: object, path: list[str]) -> str:
    """The constructor's argument that a place belongs to, or the place."""
    if path[:1] == ["factories"]:  # of a LitPPO: by model, optimizer and schedule
        return f"{path[1]}_{'scheduler' if path[2:3] == ['1'] else 'optimizer'}"
    arguments = inspect.signature(type(owner).__init__).parameters
    return next((name for part in path if (name := part.strip("_")) in arguments), ".".join(path))
