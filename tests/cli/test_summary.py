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

from lit_ppo.callbacks import CollapseMonitor
from lit_ppo.cli.summary import RunSummary, warned
from tests.helpers.scripted import Automatic, Clock, Scripted, fit
from tests.helpers.toys import make_data, make_module, make_trainer, write_prompts

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


def summary(folder: Path, capsys: pytest.CaptureFixture[str], module: Any, **options: Any) -> list[str]:
    """Lines that a run prints; its metrics are the update's number and 1234.4 tokens per second."""
    others, callback = options.pop("others", []), options.pop("summary", None) or RunSummary()
    capsys.readouterr()
    on_interrupt = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(SystemExit, RuntimeError, SIGTERMException):
        fit(folder, module, *([Silence()] if options.pop("bar", True) else []), *others, callback, **options)
    signal.signal(signal.SIGINT, on_interrupt)  # Lightning ignores it after one
    return capsys.readouterr().out.strip("\n").splitlines()


def test_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock):
    assert summary(tmp_path, capsys, Scripted(clock, [10] * 3), max_epochs=1) == [
        "3 updates in 30 s:",
        "  score 0 -> 2",
        "  tok/s 1,234 -> 1,234",
    ]


@pytest.mark.parametrize(
    ("updates", "words", "score"),
    [
        (1, "1 update in 10 s:", "0"),
        (30, "30 updates in 5 min 0 s; means of the first and the last 3:", "1 -> 28"),
        (300, "300 updates in 50 min 0 s; means of the first and the last 10:", "4.5 -> 294"),  # 294.5, half to even
    ],
)
def test_ends_are_means_of_a_tenth_of_the_updates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock, updates: int, words: str, score: str
):
    callback = RunSummary()
    options: dict[str, Any] = {"max_epochs": updates, "limit_train_batches": 1, "summary": callback}
    assert summary(tmp_path, capsys, Scripted(clock, [10] * updates), **options)[:2] == [words, f"  score {score}"]
    assert len(callback.state_dict()["series"]["score"]) == min(updates, 20)


@pytest.mark.parametrize(("every", "held_out"), [(1, "2 -> 6"), (2, "4")])
def test_held_out_scores_are_of_the_first_and_the_last_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock, every: int, held_out: str
):
    """Twice the number of updates; the 100 s of a batch are the run's as well; the sanity check is no measurement."""
    options: dict[str, Any] = {"limit_val_batches": 2, "val_check_interval": every, "num_sanity_val_steps": 2}
    lines = summary(tmp_path, capsys, Scripted(clock, [10] * 3), max_epochs=1, **options)
    assert lines[0] == f"3 updates in {'10 min 30 s' if every == 1 else '3 min 50 s'}:"
    assert lines[1] == f"  score 0 -> 2  (held-out {held_out})"


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
def test_of_a_run_that_ends_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock, how: Any, epochs: int, words: str
):
    lines = summary(tmp_path, capsys, Scripted(clock, [10] * 6), others=[Ends(how)], max_epochs=epochs)
    assert lines[0].startswith(words)
    assert lines[1] == "  score 0 -> 1"


def test_nothing_of_a_run_that_never_began(tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock):
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    for hook in ("setup", "on_train_batch_start"):
        broken = L.Callback()
        setattr(broken, hook, fails)
        assert summary(tmp_path, capsys, Scripted(clock, [10]), others=[broken]) == []
    assert summary(tmp_path, capsys, Scripted(clock, [10]), max_steps=0) == []


def test_a_resumed_run_covers_the_full_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock):
    """Two updates and a validation until the checkpoint, then one each; the time between does not count."""

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    options: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 1, "val_check_interval": 1}
    fit(tmp_path, Scripted(clock, [10] * 3), Silence(), RunSummary(), Saves(), **options)
    clock.now += 5000.0
    assert summary(tmp_path, capsys, Scripted(clock, [10] * 3), resume=tmp_path / "two.ckpt", **options)[:2] == [
        "3 updates (2 of them before it was resumed) in 3 min 50 s:",
        "  score 0 -> 2  (held-out 2 -> 6)",
    ]


def test_steps_of_accumulated_batches_count(tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock):
    """Steps of batches 0 and 1, 2, 3 and 4, 5; the loss is the number of the last batch."""
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "limit_val_batches": 1}
    assert summary(tmp_path, capsys, Automatic(), **options) == ["4 steps in 0 s:", "  loss 1 -> 5  (held-out 2 -> 4)"]


def test_silent_without_a_progress_bar_and_on_other_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    options: dict[str, Any] = {"bar": False, "enable_progress_bar": False}
    assert summary(tmp_path, capsys, Scripted(clock, [10] * 3), max_epochs=1, **options) == []
    monkeypatch.setattr(L.Trainer, "is_global_zero", False)
    assert summary(tmp_path, capsys, Scripted(clock, [10] * 3), max_epochs=1) == []


def test_what_monitors_have_warned_of():
    class Guard:
        def __init__(self, *told: str) -> None:
            self.told = list(told)

    assert warned([Ends(), Guard(), Guard("alarm at update 3 (kl)"), Guard("a", "b", "c", "d", "e")]) == [
        "Guard: no warnings.",
        "Guard: alarm at update 3 (kl).",
        "Guard: a, b, c, and 2 more.",
    ]


@pytest.mark.filterwarnings("ignore:CollapseMonitor", "ignore:GPU available")
def test_of_litppo_with_a_monitor(tmp_path: Path, tiny_lm: Path, capsys: pytest.CaptureFixture[str]):
    """The numbers are the logged ones; the monitor warns of any length but the first one's."""
    callbacks = [Silence(), CollapseMonitor(length=(1.0001, 99.0)), RunSummary()]
    trainer = make_trainer(tmp_path, callbacks=callbacks, enable_progress_bar=True, max_steps=2)
    trainer.fit(make_module(tiny_lm), make_data(tmp_path, val_path=str(write_prompts(tmp_path / "val.jsonl", 5))))
    lines = capsys.readouterr().out.strip().splitlines()
    rows: Any = trainer.loggers[0].rows  # type: ignore[attr-defined]
    score, held_out = ([f"{row[name]:.3g}" for row in rows if name in row] for name in ("objective/score", "val/score"))
    assert lines[1] == f"  score {score[0]} -> {score[1]}  (held-out {held_out[0]} -> {held_out[-1]})"
    assert [line.split()[0] for line in lines[2:-1]] == ["kl", "length", "tok/s"]
    assert lines[-1] == "CollapseMonitor: warning at update 2 (length)."
