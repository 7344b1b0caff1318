"""When a rank dies, the run ends with words that name it, and with exit code 1.

Lightning kills the process that has started the ranks too, with SIGKILL and without a word.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lit_ppo.parallel.ranks import rank

PATIENCE = 20.0  # seconds in which this rank can end by itself: it knows more about its error
Processes = Sequence["subprocess.Popen[Any]"]
RESUME = "to resume from the last checkpoint, add --ckpt_path last"


class WatchingLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks as Lightning does, and watches them while the Trainer runs."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        done = threading.Event()
        threading.Thread(target=_watch, args=(self.procs, done), name="ranks", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            return function(*args, **kwargs)
        finally:
            done.set()


def _watch(processes: Processes, done: threading.Event) -> None:
    while not done.wait(0.5):
        if lost_rank(processes) and not done.wait(PATIENCE):
            _end(processes)


def _end(processes: Processes) -> None:
    """End the other ranks and this process."""
    print(f"lit-ppo: error: {lost_rank(processes)}; all ranks end; {RESUME}", file=sys.stderr, flush=True)
    for process in processes:
        if process.poll() is None:
            process.kill()
    os._exit(1)


def watch_instead_of_lightning() -> None:
    """Let Lightning's observer end this process as this module does, where a Trainer has started the ranks itself."""
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._terminate_all = partial(_end, thread._child_processes)  # type: ignore[method-assign]


def lost_rank(processes: Processes, wait: float = 0.0) -> str:
    """The first of the other ranks that has failed, and how; empty if all are well.

    Args:
        processes: Of the ranks from 1 on, on this machine.
        wait: Seconds to wait for one to fail.
    """
    end = time.monotonic() + wait
    while True:
        for number, process in enumerate(processes, 1):
            if code := process.poll():
                return f"rank {number} (process {process.pid}) {_how(code)}"
        if time.monotonic() >= end:
            return ""
        time.sleep(0.05)


def _how(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}; its own error is above"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")


def explain(error: BaseException, processes: Processes) -> str | None:
    """Say which rank is gone, where an error only says that a connection is; None for any other error.

    Args:
        error: What this rank ended with.
        processes: Those that it has started for the other ranks.
    """
    if not processes and not (dist.is_available() and dist.is_initialized()):
        return None
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and len(causes) < 20:
        causes.append(cause)
    if not any(map(_is_connection, causes)):
        return None
    lost = lost_rank(processes, wait=2.0)
    if lost:
        return f"{lost}; rank {rank()} cannot go on without it; {RESUME}"
    if not _is_connection(error):
        return None  # it says so itself
    return (
        f"rank {rank()} gets no answer from the other ranks: one has ended, was killed, or hangs; see its own output; "
        f"{RESUME}"
    )


def _is_connection(error: BaseException) -> bool:
    words = ("gloo/", "NCCL", "reset by peer", "closed by peer", "Broken pipe")
    of_backend = type(error) is RuntimeError and any(word in str(error) for word in words)
    return of_backend or isinstance(error, dist.DistError)
