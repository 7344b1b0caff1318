"""A time limit for code that may never return."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _TimeIsUp(BaseException):
    """Not an ``Exception``, so that retries in the code that hangs do not catch it."""


@contextmanager
def time_limit(seconds: float | None, what: str) -> Iterator[None]:
    """Raise an error in the body of a ``with`` statement if it takes too long, by an alarm signal.

    It interrupts only the main thread, while that runs Python or waits in a call that a signal ends. Windows has no
    alarm signal, and so no limit.

    Args:
        seconds: The limit; None for no limit.
        what: Start of the message.

    Raises:
        TimeoutError: The time is up.
    """
    if seconds is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeIsUp:
        raise TimeoutError(f"{what}: no result within {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
