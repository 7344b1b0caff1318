"""SIGTERM, and the signal by which SLURM says that a job will be requeued: end the step at work, save, leave."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from lit_ppo.parallel.ranks import greatest
from lit_ppo.run.interrupt import is_first_process


class StopRequest:
    """Notes a request to stop, for the end of the step at work: only there do weights, counts and data agree.

    Lightning's own handlers are put aside for as long as it listens: with several ranks they wait for each other
    inside the handler, wherever each of them happens to be, and SLURM's saves in mid-step.
    """

    def __init__(self) -> None:
        self.listening = False
        self._received = 0
        self._requeue = 0  # SLURM's signal, 0 where there is none
        self._before: dict[int, Any] = {}

    def listen(self, trainer: L.Trainer) -> None:
        """Take the signals over; only the main thread can."""
        if os.name == "nt" or threading.current_thread() is not threading.main_thread():
            return
        self._received = 0
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = int(environment.requeue_signal or signal.SIGUSR1)
        for number in {int(signal.SIGTERM), self._requeue} - {0}:
            self._before[number] = signal.signal(number, self._note)
        self.listening = True

    def close(self) -> None:
        """Put back what was there."""
        self.listening = False
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received:  # asked twice: no more patience
            raise SystemExit(128 + number)
        self._received = number
        if is_first_process():
            name = signal.Signals(number).name
            print(f"lit-ppo: {name}: saving after this step; a second one ends the run at once", file=sys.stderr)

    def agreed(self) -> int:
        """The signal that any of the ranks has received, 0 for none; collective."""
        return greatest(self._received)

    def obey(self, trainer: L.Trainer, number: int) -> None:
        """After the step is saved: requeue the job if that was the signal, and end the run on all ranks."""
        signals = trainer._signal_connector
        if number == self._requeue:
            signals._slurm_sigusr_handler_fn(number, None)  # type: ignore[arg-type]
        signals.received_sigterm = True  # by which Lightning leaves its loops
