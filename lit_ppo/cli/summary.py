"""The summary of a run, printed at its end."""

import math
from copy import deepcopy
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ppo.cli.heartbeat import duration
from lit_ppo.cli.progress import number, short, total_updates, unit, updates_done

ENDS = 10  # values at the start and at the end of a run that are averaged, at most


class RunSummary(L.Callback):
    """Prints at the end of ``fit``, however it ends, what the run has done.

    Each metric of the progress bar has a line: its means over the first and the last tenth of the updates (ten at
    most), and its first and last value on held-out data. The warnings of the monitors follow. After a resume the
    summary covers the full run. It needs a trainer with a progress bar.
    """

    _timer = Timer()  # never started

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._timer = Timer()
        self._series: dict[str, list[float]] = {}  # the first and the last values
        self._held_out: dict[str, list[float]] = {}  # the first and the last value

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._timer.on_train_start(trainer, pl_module)
        self._done = self._resumed_after = updates_done(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if updates_done(trainer) == self._done:
            return  # in the middle of accumulated batches
        self._done = updates_done(trainer)
        for name, value in trainer.progress_bar_metrics.items():
            if not name.startswith("val/"):
                values = self._series.setdefault(short(name), [])
                values.append(float(value))
                del values[ENDS:-ENDS]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, value in {} if trainer.sanity_checking else trainer.callback_metrics.items():
            if name.startswith("val/"):
                self._held_out[name] = [*self._held_out.get(name, [])[:1], float(value)]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._timer.on_train_end(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._timer.start_time() is not None:  # Lightning's bars are on the screen until now
            total = total_updates(trainer)
            early = self._done < total if total < math.inf else trainer.should_stop
            self._print(trainer, "Stopped early: " if early else "")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._timer.start_time() is not None and self._done > self._resumed_after:
            asked = isinstance(exception, KeyboardInterrupt | SIGTERMException)
            self._print(trainer, "Interrupted: " if asked else f"Ended by an error ({type(exception).__name__}): ")

    def _print(self, trainer: Any, how: str) -> None:
        if not trainer.is_global_zero or trainer.progress_bar_callback is None:
            return
        n, total, ends = self._done, total_updates(trainer), min(ENDS, max(1, self._done // 10))
        updates = f"{n:,}" + (f" of {total:,.0f}" if n < total < math.inf else "") + f" {unit(trainer)}{'s' * (n != 1)}"
        resumed = f" ({self._resumed_after:,} of them before it was resumed)" if self._resumed_after else ""
        means = f"; means of the first and the last {ends}" if ends > 1 else ""
        lines = [f"\n{how}{updates}{resumed} in {duration(self._timer.time_elapsed())}{means}:"]
        for name, values in self._series.items():
            held_out = self._held_out.get(f"val/{name}")
            measured = f"  (held-out {_moved(held_out, 1)})" if held_out else ""
            lines.append(f"  {name} {_moved(values, ends)}{measured}")
        print("\n".join([*lines, *warned(trainer.callbacks)]), flush=True)

    def state_dict(self) -> dict[str, Any]:
        return deepcopy({"timer": self._timer.state_dict(), "series": self._series, "held_out": self._held_out})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._timer.load_state_dict(state_dict["timer"])
        self._series, self._held_out = deepcopy(state_dict["series"]), deepcopy(state_dict["held_out"])


def _moved(values: list[float], n: int) -> str:
    """The mean of the first and of the last ``n`` values."""
    first, last = (number(sum(part) / len(part)) for part in (values[:n], values[-n:]))
    return f"{first} -> {last}" if len(values) > 1 else last


def warned(callbacks: list[Any]) -> list[str]:
    """The first warnings of each monitor: a callback that keeps a list of them in ``told``."""
    lines = []
    for callback in callbacks:
        if (told := getattr(callback, "told", None)) is not None:
            more = f", and {len(told) - 3} more" if len(told) > 3 else ""
            lines.append(f"{type(callback).__name__}: {', '.join(told[:3]) or 'no warnings'}{more}.")
    return lines
