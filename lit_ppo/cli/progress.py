"""Progress on the console: a bar on a terminal, plain lines where the output is piped."""

import functools
import logging
import math
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm  # type: ignore[import-untyped]

from lit_ppo.cli.story import Story, fitting, short, total_updates, updates_done

SECONDS = 5.0  # between two lines
DRAWN = 0.1  # seconds between two drawings
BAR = 10  # columns


class _Bar(Story, ProgressBar):
    """What both have of a progress bar."""

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True
        self._last = float("-inf")  # time of the last telling

    def enable(self) -> None:
        """Tell."""
        self.is_enabled = True

    def disable(self) -> None:
        """Tell nothing: on all ranks but the first."""
        self.is_enabled = False

    @property
    def is_disabled(self) -> bool:
        """Whether it tells nothing."""
        return not self.is_enabled


class LineProgress(_Bar):
    """Prints a line every few seconds, for output that goes to a file.

    Args:
        seconds: Time between two lines; the first and the last step always get one.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        super().__init__()
        self.seconds = seconds
        self._told = -1  # after how many updates

    def show(self, *, force: bool = False) -> None:
        """Print where the run stands, unless a line was printed just before."""
        now = self.clock()
        if self.is_enabled and (force or now - self._last >= self.seconds):
            self._last, self._told = now, updates_done(self._run)
            self.on_line()
            print(self.line(), flush=True)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """The last line, where a run ends early."""
        if self._told != updates_done(trainer):
            self.show(force=True)
        super().on_train_end(trainer)


class PhaseBar(_Bar):
    """One line that is drawn again and again, for a terminal: all of the run's updates, whatever its epochs.

    Warnings, and what Lightning has to say, are printed above it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._put_back: list[Callable[[], None]] = []

    def disable(self) -> None:
        """Draw no more."""
        super().disable()
        self._close()

    def show(self, *, force: bool = False) -> None:
        """Draw, unless that was done just before; begins the line where there is none."""
        now = self.clock()
        if self.is_enabled and (force or now - self._last >= DRAWN):
            if self._bar is None:
                self._bar = tqdm(file=sys.stdout, leave=True, ncols=1, nrows=2, bar_format="{desc}")
                self._make_room()
            self._last = now
            self.redraw()

    def redraw(self) -> bool:
        """Draw what stands in the line as it is now; False if there is none."""
        bar, words, columns = self._bar, self.words(), shutil.get_terminal_size().columns - 1
        if bar is None:
            return False
        fitting_in = self._run.state.fn == "fit" and self._run.train_dataloader is not None
        total = total_updates(self._run) if fitting_in else 0.0
        bar.bar_format, bar.ncols = "{desc}", columns  # tqdm draws nothing where a terminal does not know its size
        if 0.0 < total < math.inf and len("  ".join(words)) + BAR + 2 <= columns:
            bar.total, bar.n, bar.bar_format = total, min(updates_done(self._run), total), f"{{bar:{BAR}}}  {{desc}}"
        bar.set_description_str(fitting(words, columns), refresh=False)
        bar.refresh()
        return True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the line."""
        _above(print)(*args, **kwargs)

    def _make_room(self) -> None:
        writers: list[tuple[Any, str]] = [(warnings, "showwarning")]
        writers += [(handler, "emit") for handler in logging.getLogger("lightning.pytorch").handlers]
        for owner, name in writers:
            before = getattr(owner, name)
            setattr(owner, name, _above(before))
            self._put_back.append(functools.partial(setattr, owner, name, before))

    def _close(self) -> None:
        """Leave the line as it is."""
        while self._put_back:
            self._put_back.pop()()
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.close()

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """The line stays on the screen."""
        self._take_metrics(trainer)
        self.redraw()
        super().on_train_end(trainer)
        self._close()

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        """The same, where there is no training."""
        super().on_validation_end(trainer)
        if self._ended:
            self._close()

    def on_test_end(self, trainer: L.Trainer, *_: Any) -> None:
        """The same."""
        super().on_test_end(trainer)
        self._close()

    def _end(self) -> None:
        super()._end()
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        """The line stays on this process's screen."""
        return super().__getstate__() | {"_bar": None, "_put_back": []}


class Beside(Story):
    """Adds phase and time left to a progress bar of Lightning's, or of anybody's, among its metrics.

    Args:
        bar: A Lightning ``ProgressBar``.
    """

    def __init__(self, bar: Any) -> None:
        super().__init__()
        self.bar = bar
        self._drawn: dict[str, Any] = {}
        get_metrics = bar.get_metrics

        def with_story(*args: Any, **kwargs: Any) -> dict[str, Any]:
            self._drawn = {short(name): value for name, value in get_metrics(*args, **kwargs).items()}
            return self._drawn | self._now()

        self.bar.get_metrics = with_story

    def _now(self) -> dict[str, str]:
        said = {"phase": self.phase(), "left": self.left()}
        return {name: word for name, word in said.items() if word}

    def redraw(self) -> bool:
        """Draw the metrics of the last step with phase and time as they are now."""
        if self._run is None:
            return False
        metrics = self._drawn | self._now()
        column, tqdm_bar = (getattr(self.bar, name, None) for name in ("_metric_component", "_train_progress_bar"))
        if column is not None:  # Rich
            column.update(metrics)
            self.bar.refresh()
        elif tqdm_bar is not None:
            tqdm_bar.set_postfix(metrics)
        return sys.stdout.isatty() and not self._ended


def _above(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have what a function prints appear above the line."""

    @functools.wraps(function)
    def above(*args: Any, **kwargs: Any) -> Any:
        with tqdm.external_write_mode():
            return function(*args, **kwargs)

    return above


def progress_bar() -> LineProgress | PhaseBar:
    """The one that suits the output."""
    return PhaseBar() if sys.stdout.isatty() else LineProgress()
