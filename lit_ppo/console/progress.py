"""Progress on the console: one line, redrawn on a terminal and printed every few seconds where the output is piped."""

import logging
import math
import re
import shutil
import sys
import time
from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm  # type: ignore[import-untyped]
from tqdm.contrib.logging import logging_redirect_tqdm  # type: ignore[import-untyped]

from lit_ppo.console.heartbeat import Heartbeat, duration
from lit_ppo.console.pace import Pace
from lit_ppo.run.figures import updates_done

EVALUATIONS = {"sanity_check": "sanity_val", "validate": "val", "test": "test", "predict": "predict"}


def total_updates(trainer: L.Trainer) -> float:
    """Updates (see :func:`updates_done`) of the full run over all epochs; infinite if unknown."""
    total, done = trainer.estimated_stepping_batches, updates_done(trainer)
    if total == trainer.max_steps and done and trainer.global_step:
        total = math.ceil(total * done / trainer.global_step)  # an update may take several optimizer steps
    return math.inf if total < 0 else total


def unit(trainer: L.Trainer) -> str:
    """What :func:`updates_done` counts."""
    return "step" if trainer.lightning_module.automatic_optimization else "update"


def short(name: str) -> str:
    """A metric's name on the console."""
    return "tok/s" if name == "throughput/tokens_per_second" else re.sub("^(objective|response|train)/", "", name)


def number(x: float) -> str:
    """Three significant digits, or all digits before the point.

    >>> number(0.3149), number(-22.0), number(-1250.4), number(999.5), number(-0.0)
    ('0.315', '-22', '-1,250', '1,000', '0')
    """
    return f"{x:,.0f}" if abs(x) >= 999.5 else f"{x + 0.0:.3g}"


class ProgressLine(ProgressBar):
    """Shows a run in one line: updates, metrics, phase, time left.

    On a terminal the line is redrawn, with a bar if there is room; warnings and Lightning's messages appear above it.
    Elsewhere it is printed every five seconds. The first and the last update are always shown.

    Args:
        heartbeat: Shows the line between steps; None starts one for the run.
    """

    def __init__(self, heartbeat: Heartbeat | None = None) -> None:
        super().__init__()
        self.clock = time.monotonic
        self.is_enabled, self.is_terminal = True, sys.stdout.isatty()
        self.seconds = 0.1 if self.is_terminal else 5.0  # between two drawings, at least
        self._heartbeat = heartbeat
        self._console, self._is_open = ExitStack(), False  # open while a loop runs

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._run = TrainerFn(stage).value
        self._metrics: dict[str, float] = {}
        self._pace = Pace()  # of training batches
        self._started = False  # whether a batch has begun
        self._since = self.clock()  # when the current batch began
        self._batches = 0  # of the current evaluation
        self._shown = -math.inf  # when the line was shown last
        if self._heartbeat is not None:
            self._heartbeat.begin(f"preparing to {self._run}")

    def enable(self) -> None:
        self.is_enabled = True

    def disable(self) -> None:
        self.is_enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        with tqdm.external_write_mode():
            print(*args, **kwargs)

    def show(self, *, force: bool = False) -> None:
        """Show the line now, unless it was shown just before."""
        if not self._is_open or not (force or self.clock() - self._shown >= self.seconds):
            return
        self._shown = self.clock()
        if not self.is_terminal:
            print(self.line(), flush=True)
            return
        bar, columns = self._bar, shutil.get_terminal_size().columns - 1  # the terminal would wrap a full line
        bar.ncols, (_, bar.n, bar.total), line = columns, self._position(), self.line(columns)
        has_bar = 0 < bar.total < math.inf and len(line) + 12 <= columns
        bar.bar_format = "{desc}  {bar:10}" if has_bar else "{desc}"
        bar.set_description_str(line)

    def line(self, columns: int | None = None) -> str:
        """The line; words that do not fit into ``columns`` are left out, the last metrics first."""
        name, done, total = self._position()
        head = f"{name} {done}" if total == math.inf else f"{name} {done}/{total:.0f}"
        metrics = [f"{short(metric)} {number(value)}" for metric, value in self._metrics.items()]
        ends = [word for word in (self._phase(), self._left()) if word]
        while columns and (metrics or ends) and len("  ".join([head, *metrics, *ends])) > columns:
            (metrics or ends).pop()
        return "  ".join([head, *metrics, *ends])[:columns]

    def _position(self) -> tuple[str, int, float]:
        """What is counted, how many are done, how many there are."""
        trainer, stage = self.trainer, self.trainer.state.stage
        if stage in EVALUATIONS:
            return stage.replace("_", " "), self._batches, sum(getattr(trainer, f"num_{EVALUATIONS[stage]}_batches"))
        return unit(trainer), updates_done(trainer), total_updates(trainer)

    def _phase(self) -> str:
        """Phase, time in it and details, as the module's ``progress`` says; else the time in this batch."""
        progress = getattr(self.trainer.lightning_module, "progress", None)
        phase, since, detail = (getattr(progress, name, None) for name in ("phase", "since", "detail"))
        if phase and (engine := getattr(progress, "engine", "")):
            phase = f"{phase} ({engine})"
        seconds = self.clock() - (self._since if since is None else since)
        phase = " ".join(word for word in (phase, duration(seconds) if seconds >= 1.0 else "") if word)
        words = ", ".join(word for word in (phase, detail) if word)
        return f"({words})" if words else ""

    def _left(self) -> str:
        """The pace of the updates, validation not counted, times the updates left."""
        trainer, pace = self.trainer, self._pace.seconds
        updates = total_updates(trainer) - updates_done(trainer) if pace is not None else 0.0
        if pace is None or not 0 < updates < math.inf:
            return ""
        spent = self.clock() - self._since if trainer.training else 0.0
        return f"{duration(updates * trainer.accumulate_grad_batches * pace - min(spent, pace))} left"

    def _open(self) -> None:
        if not self._is_open and self.is_enabled:
            if self.is_terminal:
                self._bar = self._console.enter_context(tqdm(file=sys.stdout, ncols=1, nrows=2, bar_format="{desc}"))
                logging.captureWarnings(True)
                self._console.callback(logging.captureWarnings, False)
                loggers = [logging.getLogger(name) for name in ("py.warnings", "lightning.pytorch")]
                self._console.enter_context(logging_redirect_tqdm(loggers))
            heartbeat = self._heartbeat or self._console.enter_context(Heartbeat())
            heartbeat.tick = self.show
            self._console.callback(heartbeat.begin, f"finishing {self._run}")
            self._is_open = True

    def _close(self, *_: Any, **__: Any) -> None:
        self._is_open = False
        self._console.close()

    def _take_metrics(self) -> None:
        """Read metrics in hooks only: the heartbeat's thread must not make Lightning compute any."""
        self._metrics = {name: float(value) for name, value in self.trainer.progress_bar_metrics.items()}

    def on_train_start(self, *_: Any) -> None:
        self._open()
        self.show(force=True)

    def on_train_batch_start(self, *_: Any) -> None:
        if not self._started:  # later ones begin where the one before ends
            self._started, self._since = True, self.clock()

    def on_train_batch_end(self, *_: Any) -> None:
        self._take_metrics()
        self._pace.add(self.clock() - self._since)
        self._since = self.clock()
        if updates_done(self.trainer) < total_updates(self.trainer):
            self.show()

    def on_train_end(self, *_: Any) -> None:
        self._take_metrics()
        self.show(force=True)
        self._close()

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self._batches, self._since = 0, self.clock()
        self._open()
        self.show()

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self._batches, self._since = self._batches + 1, self.clock()
        self.show()

    def on_validation_end(self, *_: Any, **__: Any) -> None:
        self._since = self.clock()
        if not self.trainer.sanity_checking:
            self._take_metrics()
        if self._run != "fit":
            self._close()

    teardown = on_exception = _close
    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_heartbeat": None, "_bar": None}  # thread and console stay in this process


progress_bar = ProgressLine  # the name in the documentation
