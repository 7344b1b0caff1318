"""A time limit for code that may never return."""

import asyncio
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from types import FrameType
from typing import Any, TypeVar

import torch

from lit_ppo.validate import needs_package

T = TypeVar("T")
GRACE = 10.0  # seconds after the limit that the code has to react; see _Watch
_UP: Any = object()
_IS_POSIX = hasattr(signal, "setitimer")


def within(seconds: float | None, what: str, call: Callable[[], T]) -> T:
    """Call a function, and raise an error if it takes too long.

    The function gets no exception that it could catch: it is left where it is, and never goes on. It runs in this
    thread, since its libraries may need the main thread, as those with alarms do, or states of this one. Outside the
    main thread, and on Windows, it runs in another thread.

    Args:
        seconds: The limit; None for no limit.
        what: Start of the message.
        call: The function.

    Raises:
        TimeoutError: The time is up.
    """
    if seconds is None:
        return call()
    in_main = threading.current_thread() is threading.main_thread()
    return (_as_greenlet if _IS_POSIX and in_main else _in_a_thread)(seconds, what, call)


def _as_greenlet(seconds: float, what: str, call: Callable[[], T]) -> T:
    """Run the function on a call stack of its own, which a signal handler can leave.

    A watching thread sends the signal. Where the function keeps Python's lock, as a regular expression does, that
    thread waits too, but a timer of the process's computing time does not. Neither is the alarm that rewards use.
    """
    needs_package("reward_timeout", "greenlet")
    from greenlet import getcurrent, greenlet  # type: ignore[import-untyped]  # few runs have a limit

    outer, inner, at = getcurrent(), greenlet(call), ""
    inner.gr_context = copy_context()
    end, loop = time.monotonic() + seconds, asyncio._get_running_loop()

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal at
        if time.monotonic() >= end and inner and getcurrent() is not outer:
            at = _place(frame)
            outer.switch(_UP)  # and never back

    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    for number in (signal.SIGURG, signal.SIGVTALRM):
        signal.signal(number, leave)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.5)
    watch = _Watch(seconds, what)
    # of C code that keeps Python's lock for ever, only this thread outside Python can end the process
    faulthandler.dump_traceback_later(seconds + 2 * GRACE, exit=True, file=2)
    try:
        result = inner.switch()
    finally:
        faulthandler.cancel_dump_traceback_later()
        watch.done.set()
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        for number in (signal.SIGURG, signal.SIGVTALRM):
            signal.signal(number, signal.SIG_DFL if before[number] is None else before[number])
    if result is _UP:
        asyncio._set_running_loop(loop)  # what the function has set must not reach anything else
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(inner))  # the end of a greenlet is an exception in it
        raise _too_long(seconds, what, at)
    return result  # type: ignore[no-any-return]


class _Watch(threading.Thread):
    """Interrupts the main thread when the time is up; ends the process if that has had no effect for ``GRACE``.

    This is so in libraries written in C that never return, which nothing in the process can stop.
    """

    def __init__(self, seconds: float, what: str) -> None:
        super().__init__(name="reward_timeout", daemon=True)
        self.done, self._seconds, self._what = threading.Event(), seconds, what
        self.start()

    def run(self) -> None:
        if self.done.wait(self._seconds):
            return
        main = threading.main_thread().ident or 0
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            signal.pthread_kill(main, signal.SIGURG)
            if self.done.wait(0.2):
                return
        error = _too_long(self._seconds, self._what, _place(sys._current_frames().get(main)))
        print(f"lit-ppo: error: {error}; it reacts to no signal; the process ends", file=sys.stderr, flush=True)
        os._exit(1)


def _in_a_thread(seconds: float, what: str, call: Callable[[], T]) -> T:
    outcome: list[Any] = []
    grad = torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        try:
            with torch.set_grad_enabled(grad):
                outcome.extend([call(), None])
        except BaseException as error:
            outcome.extend([None, error])

    thread = threading.Thread(target=copy_context().run, args=(run,), name="reward", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise _too_long(seconds, what, _place(sys._current_frames().get(thread.ident or 0)))
    result, error = outcome
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def _too_long(seconds: float, what: str, at: str) -> TimeoutError:
    return TimeoutError(f"{what}: no result within {seconds:g} s{at}; speed the code up or raise the limit")


def _place(frame: FrameType | None) -> str:
    """Where the function waits: the innermost line outside Python's own library and this package, if there is one."""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_LIBRARY) and not file.startswith("<"):
            return f" ({file}, line {frame.f_lineno})"
        frame = frame.f_back
    return ""


_LIBRARY = (os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(__file__)))
