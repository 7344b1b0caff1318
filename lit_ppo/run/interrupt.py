"""Ctrl-C and SIGTERM: leave within seconds, and leave no process behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

GRACE = 8.0  # seconds that an orderly shutdown may take before the process is ended
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


RANK_VARIABLES = ("LOCAL_RANK", "RANK", "SLURM_PROCID")  # set by whoever launches several processes


def is_first_process() -> bool:
    """False in a launched process that is not the first."""
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)


class Interrupts:
    """Turns the first stop signal into ``KeyboardInterrupt`` and sees to it that the process then ends.

    A thread is told of the signal at once, even while the main thread is inside a long operation that runs no
    Python; if the main thread has not ended after ``GRACE`` seconds, it stops the children and the process. A run
    in training takes its first SIGTERM itself, and has as long as its step takes.

    Args:
        last_words: Called once before a forced exit, to print what the orderly one would have printed.
    """

    def __init__(self, last_words: Callable[[], None]) -> None:
        self.received: int | None = None
        self.last_words = last_words
        self.kill_children: list[Callable[[], None]] = []
        self.will_stop: Callable[[], bool] = lambda: False  # whether a run sees to SIGTERM itself: it saves first
        self._raised = False
        self._done = threading.Event()
        self._handlers: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM, as shells have it."""
        return 128 + (self.received or signal.SIGINT)

    def __enter__(self) -> "Interrupts":
        """Install the handlers; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._handlers[number] = signal.signal(number, self._stop)
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._reader.settimeout(0.5)
            self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="interrupts", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Put everything back as it was, and end what is left of the children."""
        self.end_children()
        self._done.set()
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._writer.close()
            self._reader.close()

    def end_children(self) -> None:
        """End every process that was registered, at once."""
        for kill in self.kill_children:
            with contextlib.suppress(Exception):  # one that cannot be ended must not keep the others alive
                kill()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._raised:  # asked twice: no more patience
            self._exit_now()
        self.received, self._raised = number, True
        raise KeyboardInterrupt

    def _watch(self) -> None:
        deadline = float("inf")
        while not self._done.is_set() and time.monotonic() < deadline:
            try:
                numbers = self._reader.recv(16)
            except TimeoutError:
                continue
            except OSError:
                return
            for number in (number for number in numbers if number in STOP_SIGNALS):
                patient = number == signal.SIGTERM and self.received is None and self.will_stop()
                self.received = self.received or number
                if not patient:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if not self._done.is_set():
            self._exit_now()

    def _exit_now(self) -> None:
        self.last_words()
        self.end_children()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.exit_code)


def end_group(process: "subprocess.Popen[Any]", patience: float = 0.0) -> None:
    """End a process that leads its own group, and all that it started.

    Args:
        process: Started with ``start_new_session=True``.
        patience: Seconds it is given to end by itself after an interrupt.
    """
    if patience and process.poll() is None:
        process.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    if os.name != "nt":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()
