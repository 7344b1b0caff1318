"""The summary at the end of a run, by hand, however the run ends."""

import contextlib
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ppo.console.summary import RunSummary, warned
from tests.helpers.scripted import Automatic, Clock, Scripted, fit
from tests.helpers.spies import Spy

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Silence(TQDMProgressBar):
    """A progress bar that prints nothing."""

    is_enabled = False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """That of the summary and of the scripted module."""
    clock = Clock()
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def summary(tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock) -> Any:
    """Runs updates of 10 s whose score is their number, and gives what is printed."""

    def run(updates: int, *callbacks: Any, module: Any = None, bar: bool = True, **options: Any) -> list[str]:
        if not any(isinstance(callback, RunSummary) for callback in callbacks):
            callbacks = (*callbacks, RunSummary())
        capsys.readouterr()
        on_interrupt = signal.getsignal(signal.SIGINT)
        with contextlib.suppress(SystemExit, RuntimeError, SIGTERMException):
            module = module or Scripted(clock, [10] * updates)
            fit(tmp_path, module, *([Silence()] if bar else []), *callbacks, **{"max_epochs": 1, **options})
        signal.signal(signal.SIGINT, on_interrupt)  # Lightning ignores it after one
        return capsys.readouterr().out.strip("\n").splitlines()

    return run


@pytest.mark.parametrize(
    ("updates", "words", "score"),
    [
        (1, "1 update in 10 s:", "0"),
        (30, "30 updates in 5 min 0 s; means of the first and the last 3:", "1 -> 28"),
        (300, "300 updates in 50 min 0 s; means of the first and the last 10:", "4.5 -> 294"),  # 294.5, half to even
    ],
)
def test_ends_are_means_of_a_tenth_of_the_updates(summary: Any, updates: int, words: str, score: str):
    callback = RunSummary()
    assert summary(updates, callback, max_epochs=updates, limit_train_batches=1)[:2] == [words, f"  score {score}"]
    assert len(callback.state_dict()["series"]["objective/score"]) == min(updates, 20)


def test_of_a_run(summary: Any, monkeypatch: pytest.MonkeyPatch):
    """Steps of accumulated batches count: 0 and 1, 2, 3 and 4, 5; the loss is the number of the last batch.

    Silent without a progress bar, and on other ranks.
    """
    assert summary(3) == ["3 updates in 30 s:", "  score 0 -> 2", "  tok/s 1,234 -> 1,234"]
    lines = summary(0, module=Automatic(), max_epochs=2, accumulate_grad_batches=2, limit_val_batches=1)
    assert lines == ["4 steps in 0 s:", "  loss 1 -> 5  (held-out 2 -> 4)"]
    assert summary(3, bar=False, enable_progress_bar=False) == []
    monkeypatch.setattr(L.Trainer, "is_global_zero", False)
    assert summary(3) == []


def test_held_out_scores_are_of_the_first_and_the_last_validation(summary: Any, clock: Clock, tmp_path: Path):
    """Twice the number of updates; the 100 s of a batch are the run's as well; the sanity check is no measurement.

    Resumed after two updates and validations, it covers the full run; the time between does not count.
    """
    options: dict[str, Any] = {"limit_val_batches": 2, "num_sanity_val_steps": 2}
    lines = summary(3, val_check_interval=2, **options)
    assert lines[:2] == ["3 updates in 3 min 50 s:", "  score 0 -> 2  (held-out 4)"]

    def saves(module: Any, *_: Any) -> None:
        if module.trainer.global_step == 4:
            module.trainer.save_checkpoint(tmp_path / "two.ckpt")

    options |= {"val_check_interval": 1}
    lines = summary(3, Spy("on_train_batch_end", saves), **options)
    assert lines[:2] == ["3 updates in 10 min 30 s:", "  score 0 -> 2  (held-out 2 -> 6)"]
    clock.now += 5000.0
    resumed = summary(3, resume=tmp_path / "two.ckpt", **options)  # one validation before the checkpoint, one behind it
    assert resumed[:2] == ["3 updates (2 of them before it was resumed) in 7 min 10 s:", lines[1]]


class Ends(L.Callback):
    """Ends the run after two updates."""

    def __init__(self, how: BaseException | None = None) -> None:
        self.how = how

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.how is not None and trainer.global_step == 4:
            raise self.how

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = self.how is None and trainer.global_step == 4


@pytest.mark.filterwarnings("ignore:.*KeyboardInterrupt")
@pytest.mark.parametrize(
    ("how", "epochs", "words"),
    [
        (None, 2, "Stopped early: 2 of 6 updates in"),
        (None, -1, "Stopped early: 2 updates in"),
        (KeyboardInterrupt(), 2, "Interrupted: 2 of 6 updates in"),
        (SIGTERMException(), 2, "Interrupted: 2 of 6 updates in"),
        (RuntimeError("broken"), 2, "Ended by an error (RuntimeError): 2 of 6 updates in"),
    ],
)
def test_of_a_run_that_ends_early(summary: Any, how: BaseException | None, epochs: int, words: str):
    lines = summary(6, Ends(how), max_epochs=epochs)
    assert lines[0].startswith(words)
    assert lines[1] == "  score 0 -> 1"


def test_nothing_of_a_run_that_never_began(summary: Any):
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    for hook in ("setup", "on_train_batch_start"):
        broken = L.Callback()
        setattr(broken, hook, fails)
        assert summary(1, broken) == []
    assert summary(1, max_steps=0) == []


def test_what_monitors_have_warned_of():
    def monitor(*told: str) -> Any:
        return type("Guard", (), {"told": list(told)})()

    assert warned([Ends(), monitor(), monitor("alarm at update 3 (kl)"), monitor("a", "b", "c", "d", "e")]) == [
        "Guard: no warnings.",
        "Guard: alarm at update 3 (kl).",
        "Guard: a, b, c, and 2 more.",
    ]
