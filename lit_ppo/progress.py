"""Progress: a bar on a terminal, plain lines where the output is piped; both name the phase at work."""

import math
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

SECONDS = 5.0  # between two lines


def phase_of(pl_module: Any) -> str:
    """What the module says it is doing: ``rollout``, ``score``, ``update``; empty if it says nothing."""
    return str(getattr(pl_module, "phase", "") or "")


def describe(trainer: L.Trainer) -> str:
    """One line on where the run stands: step, metrics of the progress bar, phase."""
    module, fn = trainer.lightning_module, trainer.state.fn
    if fn is None or module is None:
        return "preparing"
    loops = {"fit": trainer.fit_loop.epoch_loop.val_loop, "validate": trainer.validate_loop, "test": trainer.test_loop}
    loop: Any = loops.get(fn.value, trainer.predict_loop)
    if trainer.sanity_checking:
        where = "checking that validation works"
    elif trainer.training and trainer.train_dataloader is not None:
        unit = "step" if module.automatic_optimization else "update"
        where = unit + _of(trainer.global_step, _total_steps(trainer))
    elif trainer.evaluating or trainer.predicting:
        counted = loop.max_batches if isinstance(loop.max_batches, list) else [loop.max_batches]
        where = str(trainer.state.stage.value if trainer.state.stage else fn.value) + _of(
            loop.batch_progress.current.completed, sum(counted)
        )
    else:
        where = f"preparing to {fn.value}"
    words = [where, *(f"{_short(name)} {value:.4g}" for name, value in trainer.progress_bar_metrics.items())]
    phase = phase_of(module)
    return " ".join(words) + (f" ({phase})" if phase else "")


def _of(done: int, total: float) -> str:
    return f" {done}" if total == math.inf else f" {done}/{total:.0f}"


def _short(name: str) -> str:
    for prefix in ("objective/", "train/"):
        name = name.removeprefix(prefix)
    return name


def _total_steps(trainer: L.Trainer) -> float:
    """Steps that the run will take; infinite where that is not known."""
    steps = trainer.num_training_batches / trainer.accumulate_grad_batches
    if steps != math.inf:
        steps = math.ceil(steps)
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
    return min(steps * epochs if steps else 0.0, trainer.max_steps if trainer.max_steps >= 0 else math.inf)


class LineProgress(ProgressBar):
    """Prints a line every few seconds, for output that goes to a file.

    Args:
        seconds: Time between two lines; the first and the last step always get one.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        super().__init__()
        self.seconds = seconds
        self.on_line: Any = lambda: None  # told of every line printed
        self._enabled = True
        self._last = float("-inf")

    def enable(self) -> None:
        """Print lines."""
        self._enabled = True

    def disable(self) -> None:
        """Print none: on all ranks but the first."""
        self._enabled = False

    def line(self, trainer: L.Trainer, *, force: bool = False) -> None:
        """Print where the run stands, unless a line was printed just before."""
        now = time.monotonic()
        if self._enabled and (force or now - self._last >= self.seconds):
            self._last = now
            self.on_line()
            print(describe(trainer), flush=True)

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """First line."""
        self.line(trainer, force=True)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """A line now and then."""
        self.line(trainer, force=trainer.global_step == _total_steps(trainer))

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """A line now and then."""
        self.line(trainer)

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """A line now and then."""
        self.line(trainer)

    def on_predict_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """A line now and then."""
        self.line(trainer)


class PhaseBar(TQDMProgressBar):
    """Lightning's bar, with the phase at work, redrawn also while one long step is running."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The logged metrics under short names, and the phase."""
        metrics = {_short(name): value for name, value in super().get_metrics(trainer, pl_module).items()}
        metrics.pop("v_num", None)
        return metrics | ({"phase": phase_of(pl_module)} if phase_of(pl_module) else {})

    def redraw(self) -> bool:
        """Show time and phase as they are now; False if there is no bar."""
        trainer = self.trainer
        if trainer.training:
            bar = self._train_progress_bar
            if bar is not None:
                bar.set_postfix(self.get_metrics(trainer, trainer.lightning_module), refresh=False)
        elif trainer.testing:
            bar = self._test_progress_bar
        else:
            bar = self._predict_progress_bar if trainer.predicting else self._val_progress_bar
        if bar is not None:
            bar.refresh()
        return bar is not None


def progress_bar() -> ProgressBar:
    """The one that suits the output."""
    return PhaseBar() if sys.stdout.isatty() else LineProgress()
