"""The summary of a run, printed at its end."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ppo.console.heartbeat import duration
from lit_ppo.console.progress import number, short, total_updates, unit
from lit_ppo.run.figures import Figures


class RunSummary(L.Callback):
    """Prints at the end of ``fit``, however it ends, what the run has done.

    Each metric of the progress bar has a line: its means over the first and the last tenth of the updates (ten at
    most), and its first and last value on held-out data. The warnings of the monitors follow. After a resume the
    summary covers the full run. It needs a trainer with a progress bar.
    """

    _timer = Timer()  # never started

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._timer = Timer()
        self._figures = Figures()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._timer.on_train_start(trainer, pl_module)
        self._figures.start(trainer)
        self._resumed_after = self._figures.done

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._figures.add_update(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._figures.add_validation(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._timer.on_train_end(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._timer.start_time() is not None:  # Lightning's bars are on the screen until now
            total = total_updates(trainer)
            early = self._figures.done < total if total < math.inf else trainer.should_stop
            self._print(trainer, "Stopped early: " if early else "")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._timer.start_time() is not None and self._figures.done > self._resumed_after:
            asked = isinstance(exception, KeyboardInterrupt | SIGTERMException)
            self._print(trainer, "Interrupted: " if asked else f"Ended by an error ({type(exception).__name__}): ")

    def _print(self, trainer: Any, how: str) -> None:
        if not trainer.is_global_zero or trainer.progress_bar_callback is None:
            return
        n, total, ends = self._figures.done, total_updates(trainer), self._figures.ends
        updates = f"{n:,}" + (f" of {total:,.0f}" if n < total < math.inf else "") + f" {unit(trainer)}{'s' * (n != 1)}"
        resumed = f" ({self._resumed_after:,} of them before it was resumed)" if self._resumed_after else ""
        means = f"; means of the first and the last {ends}" if ends > 1 else ""
        lines = [f"\n{how}{updates}{resumed} in {duration(self._timer.time_elapsed())}{means}:"]
        for name, values in self._figures.means().items():
            held_out = self._figures.held_out.get(f"val/{short(name)}")
            measured = f"  (held-out {_moved(held_out)})" if held_out else ""
            lines.append(f"  {short(name)} {_moved(values)}{measured}")
        print("\n".join([*lines, *warned(trainer.callbacks)]), flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"timer": dict(self._timer.state_dict()), **self._figures.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._timer.load_state_dict(state_dict["timer"])
        self._figures.load_state_dict(state_dict)


def _moved(values: list[float]) -> str:
    return " -> ".join(map(number, values))


def warned(callbacks: list[Any]) -> list[str]:
    """The first warnings of each monitor: a callback that keeps a list of them in ``told``."""
    lines = []
    for callback in callbacks:
        if (told := getattr(callback, "told", None)) is not None:
            more = f", and {len(told) - 3} more" if len(told) > 3 else ""
            lines.append(f"{type(callback).__name__}: {', '.join(told[:3]) or 'no warnings'}{more}.")
    return lines
