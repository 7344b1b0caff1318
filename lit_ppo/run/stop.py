"""Ctrl-C, SIGTERM and SLURM's requeue signal: how a run ends early.

The command installs its handlers before it loads PyTorch, so this module imports the standard library only.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

GRACE = 8.0  # seconds for an orderly exit
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
RANK_VARIABLES = ("LOCAL_RANK", "RANK", "SLURM_PROCID")  # set by launchers of several processes


def is_first_process() -> bool:
    """False in a launched process that is not the first."""
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)


class Interrupts:
    """Turns the first stop signal into ``KeyboardInterrupt``, and forces the exit if the process still runs later.

    A thread learns of the signal at once, even while the main thread is in a long operation outside Python. If the
    process has not ended ``GRACE`` seconds later, the thread ends it, as a second signal does. SIGTERM during training
    is left to ``StopRequest``: the run may then take as long as its step.

    Args:
        last_words: Called before a forced exit, to print what an orderly exit prints.
    """

    def __init__(self, last_words: Callable[[], None]) -> None:
        self.received: int | None = None
        self.last_words = last_words
        self.kill_children: list[Callable[[], None]] = []
        self.will_stop: Callable[[], bool] = lambda: False  # whether a StopRequest handles SIGTERM
        self._raised = False
        self._done = threading.Event()
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM, as in shells."""
        return 128 + (self.received or signal.SIGINT)

    def __enter__(self) -> "Interrupts":
        hangup = getattr(signal, "SIGHUP", None)
        ignored = [hangup] if hangup and signal.getsignal(hangup) == signal.SIG_IGN else []  # nohup
        self._before = _install(self._stop, (number for number in STOP_SIGNALS if number not in ignored))
        if self._before:
            reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), name="interrupts", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end_children()
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            _restore(self._before)
            self._done.set()
            self._writer.shutdown(socket.SHUT_RDWR)  # ends the thread
            self._writer.close()

    def run_child(self, command: list[str], environment: dict[str, str], patience: float = 4.0) -> int:
        """Run a command on the same console, in a process group of its own that an interrupt ends.

        Args:
            command: Program and arguments.
            environment: All environment variables.
            patience: Seconds that the interrupted command gets to end by itself.

        Returns:
            The exit code; negative: the signal that ended the command.
        """
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
        self.kill_children.append(lambda: _end_group(process))
        try:
            while process.poll() is None:
                time.sleep(0.05)  # unlike a wait, a signal interrupts it on every system
        finally:
            _end_group(process, patience)
            self.kill_children.pop()
        return process.returncode

    def end_children(self) -> None:
        """End every registered process at once."""
        for kill in self.kill_children:
            with contextlib.suppress(Exception):  # the others must still be ended
                kill()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._raised:
            self._exit_now()
        self.received, self._raised = number, True
        raise KeyboardInterrupt

    def _watch(self, reader: socket.socket) -> None:
        with reader:  # kept open to the end: each signal writes to its other end
            while received := reader.recv(1):
                number = received[0]
                if number not in STOP_SIGNALS:
                    continue
                saves_first = number == signal.SIGTERM and self.received is None and self.will_stop()
                self.received = self.received or number
                if not saves_first and not self._done.wait(GRACE):
                    self._exit_now()

    def _exit_now(self) -> None:
        self.last_words()
        self.end_children()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.exit_code)


class StopRequest:
    """Notes SIGTERM, or SLURM's requeue signal, so that the current step can end and be saved.

    Weights, counters and the position in the data agree only between steps. Lightning's own handlers are replaced
    meanwhile: with several ranks they wait for each other inside the handler, and SLURM's saves in the middle of a
    step. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal
        self._requeue = 0
        self._before: dict[int, Any] = {}

    @property
    def listening(self) -> bool:
        """Whether this object handles SIGTERM now."""
        return bool(self._before)

    def listen(self, trainer: Any) -> None:
        """Replace the handlers, if this is the main thread."""
        environment = trainer._accelerator_connector.cluster_environment
        requeues = getattr(environment, "auto_requeue", False)  # SLURM's
        self._requeue = int(environment.requeue_signal or signal.SIGUSR1) if requeues else 0
        self.received = 0
        if os.name != "nt":
            self._before = _install(self._note, {int(signal.SIGTERM), self._requeue} - {0})

    def close(self) -> None:
        """Restore the handlers."""
        _restore(self._before)
        self._before = {}

    def obey(self, trainer: Any, number: int) -> None:
        """Requeue the job if that was the signal, and let Lightning leave its loops. Call it once the step is saved.

        Args:
            trainer: The run's.
            number: The signal, from whichever rank received it.
        """
        signals = trainer._signal_connector
        if number == self._requeue:
            signals._slurm_sigusr_handler_fn(number, None)
        signals.received_sigterm = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise SystemExit(128 + number)
        self.received = number
        if is_first_process():
            name = signal.Signals(number).name
            print(f"lit-ppo: {name}: saving after this step; a second signal ends the run at once", file=sys.stderr)


def _install(handler: Callable[[int, FrameType | None], None], numbers: Iterable[int]) -> dict[int, Any]:
    """Handle the signals, and return the previous handlers; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _end_group(process: "subprocess.Popen[Any]", patience: float = 0.0) -> None:
    """End a process that leads its own group, and all that it started; ``patience``: seconds it may take by itself."""
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
