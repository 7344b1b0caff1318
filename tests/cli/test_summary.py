"""The last words of a run, by hand, however it ends."""

import contextlib
import math
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ppo.callbacks import CollapseMonitor
from lit_ppo.cli.progress import LineProgress
from lit_ppo.cli.summary import RunSummary, said
from tests.helpers.scripted import Automatic, Clock, Scripted, fit
from tests.helpers.toys import make_data, make_module, make_trainer, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Silence(LineProgress):
    """A progress bar that prints nothing."""

    def show(self, *, force: bool = False) -> None:
        self.watched = True


def summary(folder: Path, capsys: pytest.CaptureFixture[str], module: Any, **options: Any) -> list[str]:
    """Lines printed by a run."""
    others, callback = options.pop("others", []), options.pop("summary", None) or RunSummary(module.clock)
    capsys.readouterr()
    on_interrupt = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(SystemExit, RuntimeError, SIGTERMException):
        fit(folder, module, *([Silence()] if options.pop("bar", True) else []), *others, callback, **options)
    signal.signal(signal.SIGINT, on_interrupt)  # Lightning ignores it after one
    return capsys.readouterr().out.strip("\n").splitlines()


def scripted(n: int, **changes: Any) -> Scripted:
    """Updates of 10 s each, scores 0.1, 0.2, ..., KL 0, 0.5, 1.0, ..."""
    scores = [0.1 * (i + 1) for i in range(n)]
    return Scripted(Clock(), **{"seconds": [10] * n, "scores": scores, "kl": [0.5 * i for i in range(n)], **changes})


def test_of_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Three updates of four responses of 2, 2, 4 and 4 tokens, 3 on average."""
    assert summary(tmp_path, capsys, scripted(3), max_epochs=1) == [
        "3 updates, 12 responses, 36 tokens in 30 s; first update to last:",
        "  score rose from 0.1 to 0.3",
        "  KL to the reference rose from 0 to 1 nats a response",
        "  length stayed at 3 tokens",
    ]


def test_ends_are_means_of_a_tenth_of_the_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """30 updates: scores 0.1 to 0.3 and 2.8 to 3.0 on average; KL 0, 0.5, 1 and 13.5, 14, 14.5."""
    assert summary(tmp_path, capsys, scripted(30), max_epochs=10) == [
        "30 updates, 120 responses, 360 tokens in 5 min; means of the first 3 updates to the last 3:",
        "  score rose from 0.2 to 2.9",
        "  KL to the reference rose from 0.5 to 14 nats a response",
        "  length stayed at 3 tokens",
    ]


def test_of_a_very_long_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """300 updates: ends of ten, not of thirty: scores 0.1 to 1.0 and 29.1 to 30; no more than these are kept."""
    callback = RunSummary()
    lines = summary(tmp_path, capsys, scripted(300), max_epochs=100, summary=callback)
    assert lines[0].endswith("means of the first 10 updates to the last 10:")
    assert lines[1] == "  score rose from 0.55 to 29.6"  # 29.55
    assert len(callback.state_dict()["series"]["score"]) == 20


def test_of_one_update_without_a_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    module = scripted(1, kl=None)
    assert summary(tmp_path, capsys, module, max_epochs=1, limit_train_batches=1) == [
        "1 update, 4 responses, 12 tokens in 10 s:",
        "  score was 0.1",
        "  length was 3 tokens",
    ]


def test_held_out_scores_are_of_the_first_and_the_last_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Measured after each update, as twice their number; the 100 s of each of the six batches are the run's as well."""
    lines = summary(tmp_path, capsys, scripted(3), max_epochs=1, limit_val_batches=2, val_check_interval=1)
    assert lines[0] == "3 updates, 12 responses, 36 tokens in 10 min 30 s; first update to last:"
    assert lines[1] == "  score rose from 0.1 to 0.3 (held-out from 2 to 6)"


def test_held_out_scores_say_when_they_were_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One validation, after the second of three updates; none after the last."""
    lines = summary(tmp_path, capsys, scripted(3), max_epochs=1, limit_val_batches=2, val_check_interval=2)
    assert lines[1] == "  score rose from 0.1 to 0.3 (held-out 4 after update 2)"


def test_held_out_scores_that_stand_still(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Still(Scripted):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/score", 0.5)

    module = Still(Clock(), [10] * 3, [0.1, 0.2, 0.3])
    lines = summary(tmp_path, capsys, module, max_epochs=1, limit_val_batches=2, val_check_interval=1)
    assert lines[1] == "  score rose from 0.1 to 0.3 (held-out 0.5)"


def test_the_check_of_validation_is_no_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options: dict[str, Any] = {"limit_val_batches": 2, "num_sanity_val_steps": 2, "check_val_every_n_epoch": 9}
    assert summary(tmp_path, capsys, scripted(3), max_epochs=1, **options)[1] == "  score rose from 0.1 to 0.3"


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
    ("how", "words"),
    [
        (None, "Stopped early: 2 of 6 updates, 8"),
        (KeyboardInterrupt(), "Interrupted: 2 of 6 updates, 8"),
        (SIGTERMException(), "Interrupted: 2 of 6 updates, 8"),
        (RuntimeError("broken"), "Ended by an error (RuntimeError): 2 of 6 updates, 8"),
    ],
)
def test_of_a_run_that_ends_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: BaseException | None, words: str
):
    lines = summary(tmp_path, capsys, scripted(6), others=[Ends(how)])
    assert lines[0].startswith(words)
    assert lines[1] == "  score rose from 0.1 to 0.2"


def test_it_comes_after_the_bars_and_all_the_same_where_the_export_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Lightning's Rich bar ends in ``teardown`` only; a failure before that is one after the last update."""

    class Last(L.Callback):
        def on_fit_end(self, *_: Any) -> None:
            print("the result")
            raise RuntimeError("no room")

    class Bar(Silence):
        def teardown(self, *_: Any, **__: Any) -> None:
            print("the bar's last words")

    lines = summary(tmp_path, capsys, scripted(3), max_epochs=1, bar=False, others=[Bar()])
    assert [lines[0], lines[2][:9]] == ["the bar's last words", "3 updates"]
    lines = summary(tmp_path, capsys, scripted(3), max_epochs=1, others=[Last()])
    assert [lines[0], lines[2][:9]] == ["the result", "3 updates"]


def test_of_a_run_without_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = summary(tmp_path, capsys, scripted(6), others=[Ends()], max_epochs=-1)
    assert lines[0].startswith("Stopped early: 2 updates, 8 responses")


def test_nothing_of_a_run_that_never_began(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Fails(Scripted):
        def during(self, update: int) -> None:
            raise RuntimeError("broken")

    assert summary(tmp_path, capsys, Fails(Clock(), [10], [0.1])) == []


def test_a_resumed_run_tells_of_the_whole_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Six updates of 10 s and four validation batches of 100, then three updates; the time between does not count."""
    module = scripted(9)
    trainer = fit(tmp_path, module, Silence(), RunSummary(module.clock), limit_val_batches=2, val_check_interval=3)
    trainer.save_checkpoint(tmp_path / "six.ckpt")
    again = scripted(9)
    again.clock.now += 5000.0
    assert summary(tmp_path, capsys, again, max_epochs=3, resume=tmp_path / "six.ckpt") == [
        "9 updates (6 of them before it was resumed), 36 responses, 108 tokens in 8 min 10 s; first update to last:",
        "  score rose from 0.1 to 0.9 (held-out from 6 to 12 after update 6)",
        "  KL to the reference rose from 0 to 4 nats a response",
        "  length stayed at 3 tokens",
    ]


def test_a_run_resumed_from_its_middle_has_the_time_until_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two updates of 10 s until the checkpoint; the third is taken twice, and counts once."""

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    module = scripted(3)
    fit(tmp_path, module, Silence(), RunSummary(module.clock), Saves(), max_epochs=1)
    lines = summary(tmp_path, capsys, scripted(3), max_epochs=1, resume=tmp_path / "two.ckpt")
    assert lines[0].startswith("3 updates (2 of them before it was resumed), 12 responses, 36 tokens in 30 s")


def test_a_resumed_run_that_does_not_know_the_first_part_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer = fit(tmp_path, scripted(6), Silence())
    trainer.save_checkpoint(tmp_path / "six.ckpt")
    assert summary(tmp_path, capsys, scripted(9), max_epochs=3, resume=tmp_path / "six.ckpt")[:2] == [
        "9 updates (6 of them before it was resumed, which are not counted here), 12 responses, 36 tokens in 30 s; "
        "first update to last:",
        "  score rose from 0.7 to 0.9",
    ]


def test_a_resumed_run_that_takes_no_update_tells_of_the_first_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Stop(L.Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    module = scripted(9)
    trainer = fit(tmp_path, module, Silence(), RunSummary(module.clock))
    trainer.save_checkpoint(tmp_path / "six.ckpt")
    options: dict[str, Any] = {"max_epochs": 3, "resume": tmp_path / "six.ckpt", "others": [Stop()]}
    assert summary(tmp_path, capsys, scripted(9), **options)[:2] == [
        "Stopped early: 6 of 9 updates (6 of them before it was resumed), 24 responses, 72 tokens in 1 min; "
        "first update to last:",
        "  score rose from 0.1 to 0.6",
    ]


def test_a_state_stays_as_it_was_taken(tmp_path: Path):
    """Whoever writes it to disk may take his time."""
    states = []

    class Takes(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            states.append(callback.state_dict())

    callback, module = RunSummary(), scripted(3)
    fit(tmp_path, module, Silence(), callback, Takes(), max_epochs=1, limit_val_batches=1, val_check_interval=1)
    assert [state["series"]["kl"] for state in states] == [[0.0], [0.0, 0.5], [0.0, 0.5, 1.0]]
    assert [state["held_out"] for state in states] == [
        {}, {"val/score": [[1, 2.0]]}, {"val/score": [[1, 2.0], [2, 4.0]]},
    ]  # fmt: skip


def test_a_second_run_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    callback = RunSummary(Clock())
    for _ in range(2):
        lines = summary(tmp_path, capsys, scripted(3), max_epochs=1, summary=callback)
        assert lines[0].startswith("3 updates, 12 responses, 36 tokens in 0 s")


def test_a_module_without_hooks_is_told_by_the_metrics_of_its_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = summary(tmp_path, capsys, scripted(3, scores=None), max_epochs=1)
    assert lines == [
        "3 updates in 30 s; first update to last:",
        "  score rose from 0 to 2",
        "  tok/s stayed at 1,234",
    ]


def test_steps_of_accumulated_batches_count_and_held_out_metrics_are_no_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Steps of batches 0 and 1, 2, 3 and 4, 5; of each the last one's number. Validation logs the step's to the bar."""
    clock = Clock()
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "limit_val_batches": 1, "summary": RunSummary(clock)}
    assert summary(tmp_path, capsys, Automatic(), **options) == [
        "4 steps in 0 s; first step to last:",
        "  loss rose from 1 to 5 (held-out from 2 to 4)",
    ]


def test_numbers_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = summary(tmp_path, capsys, scripted(3, scores=[math.nan, 0.0, 1.0]), max_epochs=1)
    assert lines[1] == "  score went from nan to 1"


@pytest.mark.parametrize("options", [{"bar": False, "enable_progress_bar": False}])
def test_silent_without_a_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]):
    assert summary(tmp_path, capsys, scripted(3), max_epochs=1, **options) == []


def test_silent_on_other_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(L.Trainer, "is_global_zero", False)
    assert summary(tmp_path, capsys, scripted(3), max_epochs=1) == []


# ---- monitors


class Watcher(L.Callback):
    """A monitor that has said something."""

    def __init__(self, *told: str) -> None:
        self.told = list(told)


class Guard(Watcher):
    """Another one."""


def test_what_monitors_have_warned_of():
    assert said([Ends(), Watcher(), Guard("alarm at update 3 (kl)")]) == [
        "Guard: alarm at update 3 (kl).",
        "Watcher: no warnings.",
    ]
    assert said([Guard(), Watcher()]) == ["Guard and Watcher: no warnings."]
    assert said([Guard("a", "b", "c")]) == ["Guard: a, b, c."]
    assert said([Guard("a", "b", "c", "d", "e")]) == ["Guard: a, b, c, and 2 more."]
    assert said([Ends()]) == []


@pytest.mark.filterwarnings("ignore:CollapseMonitor", "ignore:GPU available")
def test_of_litppo_with_a_monitor(tmp_path: Path, tiny_lm: Path, capsys: pytest.CaptureFixture[str]):
    """The numbers are those that were logged; the monitor warns of any length but the first one's."""
    data: Any = {"val_path": str(write_prompts(tmp_path / "held_out.jsonl", 5))}
    callbacks = [Silence(), CollapseMonitor(length=(1.0001, 99.0)), RunSummary()]
    trainer = make_trainer(tmp_path, callbacks=callbacks, enable_progress_bar=True, max_steps=2)
    trainer.fit(make_module(tiny_lm), make_data(tmp_path, **data))
    lines = capsys.readouterr().out.strip().splitlines()
    rows: Any = trainer.loggers[0].rows  # type: ignore[attr-defined]
    first, last = [row for row in rows if "objective/score" in row]
    before, after = [row["val/score"] for row in rows if "val/score" in row]
    tokens = 7 * first["response/length"] + 5 * last["response/length"]
    assert lines[0].startswith(f"2 updates, 12 responses, {tokens:.0f} tokens in ")
    assert before == after  # of five prompts
    assert lines[1:3] == [
        f"  score {change(first, last, 'objective/score')} (held-out {after:.3g})",
        f"  KL to the reference {change(first, last, 'objective/kl')} nats a response",
    ]
    assert lines[-1] == "CollapseMonitor: warning at update 2 (length)."


def change(first: dict[str, float], last: dict[str, float], name: str) -> str:
    assert first[name] != last[name]
    return f"{'rose' if last[name] > first[name] else 'fell'} from {first[name]:.3g} to {last[name]:.3g}"
