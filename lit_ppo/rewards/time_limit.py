"""An end to code that may never come back."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _TimeIsUp(BaseException):
    """No ``Exception``: the retries of whatever hangs must not swallow it."""


@contextmanager
def time_limit(seconds: float | None, what: str) -> Iterator[None]:
    """Raise where the body takes longer: in its own frames, as an alarm of the system.

    The main thread alone can be interrupted, and only while it runs Python or waits in a call that a signal ends.
    On Windows there is no such alarm, and no limit.

    Args:
        seconds: The limit; None for none.
        what: Opens the message.

    Raises:
        TimeoutError: Time was up.
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
