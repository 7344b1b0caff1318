"""Calls that a time and a memory limit can end, whatever they do: in a forked process."""

import gc
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

SECONDS = 5.0
"""Processor time of one call; ten times as much may pass."""

MEMORY = 2**30
"""Bytes that a call may allocate."""


def isolated(task: Callable[[int], T], n: int, refuse: Callable[[int, str], NoReturn], memory: int = MEMORY) -> list[T]:
    """``[task(0), ..., task(n - 1)]``, where each call has a limit on its time and on its memory.

    A forked process runs the calls. The kernel ends it when a call takes too long, so no exception has to interrupt
    code that may catch it or may be in C. Where a process cannot be forked (Windows), there are no limits.

    Args:
        task: Must not use a device or a process group. Results must be picklable.
        n: Number of calls.
        refuse: Raises the error of a call that reached a limit, by its number and with the reason.
        memory: Bytes that a call may allocate.

    Raises:
        ValueError: A call raised it, or reached a limit.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with receiver, sender:
        child = _fork() if n else None
        if child is None:
            return [task(i) for i in range(n)]
        if not child:
            _run(task, n, sender, memory)
        sender.close()
        results: list[T] = []
        status = None
        try:
            while len(results) < n:
                problem, result = receiver.recv()
                if isinstance(result, BaseException):
                    raise result
                if problem:
                    refuse(len(results), problem)
                results.append(result)
        except EOFError:  # the child has ended
            _, status = os.waitpid(child, 0)
            reasons: dict[int, str] = {signal.SIGPROF: f"has not ended after {SECONDS:g} s", signal.SIGALRM: "hangs"}
            reason = reasons.get(status & 127, f"ended its process (status {status})")
        finally:
            if status is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    if status is not None:
        refuse(len(results), reason)
    return results


def _fork() -> int | None:
    """0 in the child, its process id in the parent; None: there is no child."""
    with warnings.catch_warnings(), suppress(AttributeError, OSError):
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not use
        return os.fork()
    return None


def _run(task: Callable[[int], Any], n: int, sender: Connection, memory: int) -> NoReturn:
    """The forked process."""
    timers = {signal.ITIMER_PROF: SECONDS, signal.ITIMER_REAL: 10 * SECONDS}
    try:
        gc.freeze()  # what the parent holds stays untouched
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        _limit_memory(memory)
        for i in range(n):
            for timer, seconds in timers.items():
                signal.setitimer(timer, seconds)
            outcome = _outcome(task, i, memory)
            for timer in timers:
                signal.setitimer(timer, 0)
            sender.send(outcome)
    finally:
        os._exit(0)


def _outcome(task: Callable[[int], Any], i: int, memory: int) -> tuple[str, Any]:
    """What is wrong, if it reached a limit; and the result or the error."""
    try:
        return "", task(i)
    except MemoryError:
        return f"needs more than {memory >> 20} MiB", None
    except ValueError as error:
        return "", ValueError(str(error))
    except Exception as error:
        return "", RuntimeError(f"{type(error).__name__}: {error}")


def _limit_memory(memory: int) -> None:
    import resource  # not on Windows

    with suppress(OSError, ValueError):  # only Linux says how much a process has
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
