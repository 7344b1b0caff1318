"""The line of progress, on a clock of the test's own: what it says, and the time left by hand."""

import io
import logging
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader

from lit_ppo import LitPPO
from lit_ppo.cli.pace import Pace
from lit_ppo.cli.progress import Beside, LineProgress, PhaseBar
from lit_ppo.cli.story import Story, fitting
from tests.helpers.scripted import Automatic, Clock, Loader, Scripted, fit
from tests.helpers.toys import make_data, make_module, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


# ---- time left


def test_time_left_is_the_recent_mean_times_what_is_left():
    """Updates of 4 and 8 seconds: a mean of 6, so three more take 18, of which 5 are gone."""
    clock = Clock()
    pace = Pace(clock=clock)
    assert pace.left(3) is None
    pace.begin()
    for seconds in (4.0, 8.0):
        clock.now += seconds
        assert pace.spent() == seconds
        pace.lap()
    assert pace.left(3) == 18.0
    clock.now += 5.0
    assert pace.left(3) == 13.0
    clock.now += 50.0
    assert pace.left(3) == 0.0  # late, but never less than nothing


def test_validation_and_updates_of_long_ago_do_not_count():
    """Of updates of 100, 1, 2 and 3 seconds the last two make a mean of 2.5; 1000 of validation are left out."""
    clock = Clock()
    pace = Pace(recent=2, clock=clock)
    pace.begin()
    for seconds in (100.0, 1.0, 2.0, 3.0):
        clock.now += seconds / 2
        pace.pause()
        clock.now += 1000.0
        assert pace.spent() == seconds / 2
        pace.go_on()
        clock.now += seconds / 2
        pace.lap()
    assert pace.left(4) == 10.0
    pace.pause()
    clock.now += 7.0
    assert pace.left(4) == 10.0


def test_time_starts_with_the_first_update():
    clock = Clock()
    pace = Pace(clock=clock)
    pace.pause()
    clock.now += 9.0
    pace.go_on()
    clock.now += 9.0
    pace.begin()
    clock.now += 2.0
    pace.begin()  # of no effect: the second update began where the first ended
    pace.lap()
    assert pace.left(1) == 2.0


# ---- the line


class Told(LineProgress):
    """Keeps its lines, one for everything that happens."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(seconds=0.0)
        self.clock, self.watched, self.lines = clock, True, []

    def show(self, *, force: bool = False) -> None:
        self.lines.append(self.line())


def test_lines_of_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two epochs of three updates, of 4, 8, 6, 6, 6 and 6 seconds: all six are counted, whatever the epoch.

    After two the mean is 6 and four are left: 24 s. Each takes two optimizer steps, which nobody counts.
    """
    clock = Clock()
    bar = LineProgress(seconds=1.0)
    bar.clock, bar.watched = clock, True
    fit(tmp_path, Scripted(clock, [4, 8, 6, 6, 6, 6]), bar)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("update")] == [
        "update 0/6",
        "update 1/6  score 0  1,234 tok/s  20 s left",
        "update 2/6  score 1  1,234 tok/s  24 s left",
        "update 3/6  score 2  1,234 tok/s  18 s left",
        "update 4/6  score 3  1,234 tok/s  12 s left",
        "update 5/6  score 4  1,234 tok/s  6 s left",
        "update 6/6  score 5  1,234 tok/s",
    ]


def test_a_run_in_mid_update_says_phase_how_long_and_how_far(tmp_path: Path):
    clock = Clock()
    bar = Told(clock)
    seen = []

    class Looked(Scripted):
        def during(self, update: int) -> None:
            self.phase_detail = "token 5/32"
            seen.append(bar.line())
            self.phase, self.phase_since, self.phase_detail = "score", self.clock.now, ""
            self.clock.now += 2.0
            seen.append(bar.line())

    fit(tmp_path, Looked(clock, [9, 69, 0.4]), bar, max_epochs=1)
    assert seen == [
        "update 0/3  (rollout 9 s, token 5/32)",
        "update 0/3  (score 2 s)",
        "update 1/3  score 0  1,234 tok/s  (rollout 1 min 9 s, token 5/32)  0 s left",
        "update 1/3  score 0  1,234 tok/s  (score 2 s)  0 s left",
        "update 2/3  score 1  1,234 tok/s  (rollout, token 5/32)  41 s left",  # (11 + 71) / 2 - 0.4
        "update 2/3  score 1  1,234 tok/s  (score 2 s)  39 s left",
    ]


def test_validation_says_where_both_are_and_stops_the_clock(tmp_path: Path):
    clock = Clock()
    bar = Told(clock)
    fit(tmp_path, Scripted(clock, [4, 6, 5]), bar, max_epochs=1, limit_val_batches=2, val_check_interval=1)
    assert "update 1/3, validation 0/2  score 0  1,234 tok/s  8 s left" in bar.lines
    assert "update 1/3, validation 1/2  score 0  1,234 tok/s  8 s left" in bar.lines
    assert "update 2/3, validation 1/2  score 1  1,234 tok/s  5 s left" in bar.lines


def test_validation_says_what_it_is_at_and_for_how_long(tmp_path: Path):
    """Its second batch comes 100 s after the first."""
    bar = Told(Clock())
    seen = []

    class Looks(Scripted):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.phase_since = self.phase_since or self.clock.now
            self.phase, self.phase_detail = "rollout", "token 5/32"
            seen.append(bar.line())
            self.clock.now += 100.0

    fit(tmp_path, Looks(bar.clock, [4] * 3), bar, max_epochs=1, limit_val_batches=2)
    assert seen == [
        "update 3/3, validation 0/2  score 2  1,234 tok/s  (rollout, token 5/32)",
        "update 3/3, validation 1/2  score 2  1,234 tok/s  (rollout 1 min 40 s, token 5/32)",
    ]


def test_metrics_of_validation_stand_in_the_line_as_soon_as_it_ends(tmp_path: Path):
    """Measured after two optimizer steps, that is, after one update of three."""
    bar = Told(Clock())
    seen = []

    class Measures(Scripted):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/score", float(self.trainer.global_step), prog_bar=True)

        def during(self, update: int) -> None:
            seen.append(bar.line())

    fit(tmp_path, Measures(bar.clock, [4] * 3), bar, max_epochs=1, limit_val_batches=2, val_check_interval=1)
    assert seen[1] == "update 1/3  score 0  1,234 tok/s  val/score 2  (rollout 4 s)  4 s left"


def test_validation_on_several_sets_counts_all_their_batches(tmp_path: Path):
    """Two batches and three; and by itself it has a last word."""

    class Two(Scripted):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            return None

    bar = Told(Clock())
    trainer = L.Trainer(callbacks=[bar], logger=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.validate(Two(bar.clock, []), [Loader(torch.zeros(2, 1)), Loader(torch.zeros(3, 1))])
    assert bar.lines == [f"validation {n}/5" for n in range(6)]
    assert bar.line() == "finishing validate"


def test_waiting_has_its_time_from_one_second_on(tmp_path: Path):
    bar = Told(Clock())
    seen = []

    class Waits(L.Callback):
        def on_fit_start(self, *_: Any) -> None:
            for seconds in (0.9, 0.1, 59.0):
                bar.clock.now += seconds
                seen.append(bar.line())

    fit(tmp_path, Scripted(bar.clock, [1] * 6), bar, Waits())
    assert seen == ["preparing to fit", "preparing to fit  (1 s)", "preparing to fit  (1 min)"]


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        ({"max_epochs": -1, "max_steps": 8}, "update 0/8", "update 4/4"),  # four updates of two steps; known after one
        ({"max_epochs": 5, "max_steps": 4}, "update 0/4", "update 2/2"),
        ({"max_epochs": 2, "limit_train_batches": 2}, "update 0/4", "update 4/4"),
    ],
)
def test_the_total_is_the_runs(tmp_path: Path, options: dict[str, Any], first: str, last: str):
    bar = Told(Clock())
    fit(tmp_path, Scripted(bar.clock, [1] * 9), bar, **options)
    assert bar.lines[0].split("  ")[0] == first
    assert bar.lines[-1].split("  ")[0] == last


@pytest.mark.parametrize(
    ("steps", "max_steps", "totals"),
    [
        ((0, 1, 0, 1), 2, (2, 3, 3, 4, 4)),  # what takes none comes on top
        ((2, 2, 2), 5, (5, 3, 3, 3)),  # after the first, three more steps make two updates of two
        ((1, 1, 4), 3, (3, 3, 3, 3)),  # three too many take nothing away
    ],
)
def test_the_total_where_updates_take_steps_of_their_own_number(
    tmp_path: Path, steps: tuple[int, ...], max_steps: int, totals: tuple[int, ...]
):
    class Takes(Scripted):
        def optimizers(self, *_: Any) -> Any:
            return super().optimizers()[:1] * steps[self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1]

    bar = Told(Clock())
    fit(tmp_path, Takes(bar.clock, [1] * 9), bar, max_epochs=-1, max_steps=max_steps)
    said = dict.fromkeys(line.split("  ")[0] for line in bar.lines)
    assert list(said) == [f"update {n}/{total}" for n, total in enumerate(totals)]


def test_accumulated_batches_make_one_step(tmp_path: Path):
    """Two steps an epoch of three batches: of two, and of the one that is left."""
    bar = Told(Clock())
    fit(tmp_path, Automatic(), bar, accumulate_grad_batches=2)
    said = dict.fromkeys(line.split("  ")[0] for line in bar.lines)
    assert list(said) == [f"step {n}/4" for n in range(5)]


def test_a_run_without_an_end_has_no_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 4

    bar = LineProgress(seconds=999.0)
    bar.clock, bar.watched = Clock(), True
    fit(tmp_path, Scripted(bar.clock, [1] * 9), bar, Stop(), max_epochs=-1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("update")]
    assert lines == ["update 0", "update 2  score 1  1,234 tok/s"]  # the first, and the last


def test_a_resumed_run_counts_all_updates_and_times_its_own(tmp_path: Path):
    """Two updates of 50 s, then, resumed, of 10, 20, 15 and 15: after the third, three of 10 s are left."""
    clock = Clock()
    trainer = fit(tmp_path, Scripted(clock, [50] * 9), Told(clock), max_epochs=1, limit_train_batches=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    bar = Told(clock)
    fit(
        tmp_path, Scripted(clock, [0, 0, 10, 20, 15, 15]), bar, max_epochs=3, limit_train_batches=2,
        resume=tmp_path / "two.ckpt",
    )  # fmt: skip
    assert bar.lines[0] == "update 2/6"
    after_three = [line for line in bar.lines if line.startswith("update 3/6")]
    assert after_three[0] == "update 3/6  score 2  1,234 tok/s  30 s left"
    assert next(line for line in bar.lines if line.startswith("update 4/6")).endswith("30 s left")  # two of 15


def test_modules_that_name_no_phase_have_the_time_in_their_step(tmp_path: Path):
    clock = Clock()
    bar = Told(clock)
    seen = []

    class Silent(Scripted):
        def during(self, update: int) -> None:
            del self.phase, self.phase_since, self.phase_detail
            seen.append(bar.line())

    fit(tmp_path, Silent(clock, [9]), bar, max_epochs=1, limit_train_batches=1)
    assert seen == ["update 0/1  (9 s)"]


# ---- what it is printed with


class Screen(io.StringIO):
    """A terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, columns: int) -> Screen:
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: SimpleNamespace(columns=columns))
    monkeypatch.setenv("COLUMNS", str(columns))
    return screen


def test_a_terminal_has_one_line_for_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three of six updates fill half of the ten columns; what was drawn before is drawn over."""
    screen = drawn(monkeypatch, 120)
    clock = Clock()
    bar = PhaseBar()
    bar.clock, bar.watched = clock, True
    fit(tmp_path, Scripted(clock, [4, 8, 6, 6, 6, 6]), bar, limit_val_batches=2)
    text = screen.getvalue()
    assert text.count("\n") == 1
    frames = [frame.rstrip() for frame in text.split("\r")]
    assert "█████       update 3/6  score 2  1,234 tok/s  18 s left" in frames
    assert "█████       update 3/6, validation 1/2  score 2  1,234 tok/s  18 s left" in frames
    assert "██████████  update 6/6  score 5  1,234 tok/s" in frames


def test_a_terminal_that_does_not_know_its_size_has_the_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """That of a container or of ``script``, say: it has 80 columns then."""
    screen = drawn(monkeypatch, 80)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (-1, -1))
    bar = PhaseBar()
    bar.clock, bar.watched = Clock(), True
    fit(tmp_path, Scripted(bar.clock, [4, 8, 6]), bar, max_epochs=1)
    frames = [frame.rstrip() for frame in screen.getvalue().split("\r")]
    assert "███▎        update 1/3  score 0  1,234 tok/s  8 s left" in frames


def test_a_narrow_terminal_gets_the_line_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    screen = drawn(monkeypatch, 36)
    bar = PhaseBar()
    bar.clock, bar.watched = Clock(), True
    fit(tmp_path, Scripted(bar.clock, [4, 8, 6]), bar, max_epochs=1)
    frames = [frame.strip() for frame in screen.getvalue().split("\r")]
    assert "update 2/3  score 1  6 s left" in frames  # with its speed it had 42
    assert max(map(len, frames)) <= 36


def test_the_last_column_stays_empty_and_the_line_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A terminal wraps a line of its own width: the words of 29 columns need 30."""
    whole = "update 2/3  score 1  6 s left"
    for columns, words in ((30, whole), (29, "update 2/3  6 s left"), (7, "update")):
        screen = drawn(monkeypatch, columns)
        bar = PhaseBar()
        bar.clock, bar.watched = Clock(), True
        fit(tmp_path, Scripted(bar.clock, [4, 8, 6]), bar, max_epochs=1)
        frames = [frame.strip() for frame in screen.getvalue().split("\r")]
        assert words in frames
        assert max(map(len, frames)) < columns
    assert fitting(["update 10/20", "score 1", "(rollout)"], 9) == "update 10"


def test_a_line_is_drawn_ten_times_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Three updates of 0.04 s: at the start, when 0.12 s have gone by as the third ends, and at the very end."""
    drawn(monkeypatch, 100)
    times = []

    class Counts(PhaseBar):
        def redraw(self) -> bool:
            times.append(round(self.clock() - 1000.0, 2))
            return super().redraw()

    bar = Counts()
    bar.clock, bar.watched = Clock(), True
    fit(tmp_path, Scripted(bar.clock, [0.04, 0.04, 0.04]), bar, max_epochs=1)
    assert times == [0.0, 0.12, 0.12]


def test_warnings_and_lightnings_words_stand_above_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    screen = drawn(monkeypatch, 100)
    shown: list[str] = []

    def showwarning(message: Any, *_: Any) -> None:
        shown.append(screen.getvalue().split("\n")[-1].split("\r")[-1])  # what stands in the line just then

    monkeypatch.setattr(warnings, "showwarning", showwarning)
    handler = logging.StreamHandler(screen)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [handler])

    class Warns(Scripted):
        def during(self, update: int) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning("the policy collapses", UserWarning, "file", 1)
            logging.getLogger("lightning.pytorch").warning("so it is")
            self.print("and so on")

    bar = PhaseBar()
    bar.clock, bar.watched = Clock(), True
    emit = handler.emit
    fit(tmp_path, Warns(bar.clock, [4]), bar, max_epochs=1, limit_train_batches=1)
    assert shown == [""]
    for said in ("so it is\n", "and so on\n"):
        assert screen.getvalue().split(said)[0].split("\r")[-1] == ""  # nothing else stood in that line
    assert (warnings.showwarning, handler.emit) == (showwarning, emit)


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_the_line_is_closed_before_results_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str):
    """Lightning prints them between the end of the loop and ``teardown``."""
    screen = drawn(monkeypatch, 100)
    ends = []

    class After(L.Callback):
        def on_validation_end(self, *_: Any) -> None:
            ends.append((bar.line(), screen.getvalue().split("\r")[-1].rstrip(" ")))

        on_test_end = on_predict_end = on_validation_end

    class Every(Scripted):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            self.clock.now += 1.0
            return batch

        predict_step = test_step

    bar = PhaseBar()
    bar.clock, bar.watched = Clock(), True
    trainer = L.Trainer(callbacks=[bar, After()], logger=False, accelerator="cpu", default_root_dir=tmp_path)
    getattr(trainer, run)(Every(bar.clock, []), DataLoader(torch.zeros(2, 1)))
    where = {"validate": "validation", "predict": "prediction"}.get(run, run)
    assert ends == [(f"finishing {run}", f"{where} 2/2\n")]


def test_the_line_is_closed_by_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Fails(Scripted):
        def during(self, update: int) -> None:
            raise RuntimeError("broken")

    screen, before = drawn(monkeypatch, 100), warnings.showwarning
    bar = PhaseBar()
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, Fails(Clock(), [4]), bar)
    assert screen.getvalue().endswith("\n")
    assert not bar.redraw()
    assert bar._pulse is None
    assert warnings.showwarning is before


def test_signs_of_life_without_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A bar in anybody's trainer sees to them itself, until the end."""
    bar = LineProgress()
    pulses = []

    class Looks(Scripted):
        def during(self, update: int) -> None:
            pulses.append(bar._pulse)
            assert "heartbeat" in [thread.name for thread in threading.enumerate()]
            print(bar._pulse.doing())

    fit(tmp_path, Looks(Clock(), [4]), bar, max_epochs=1, limit_train_batches=1)
    assert "update 0/1  (rollout" in capsys.readouterr().out
    assert pulses[0]._done.is_set()
    assert bar._pulse is None


def test_other_ranks_have_no_pulse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(L.Trainer, "is_global_zero", False)
    bar = LineProgress()
    pulses = []

    class Looks(Scripted):
        def during(self, update: int) -> None:
            pulses.append(bar._pulse)

    fit(tmp_path, Looks(Clock(), [4]), bar, max_epochs=1, limit_train_batches=1)
    assert pulses == [None]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bars = [LineProgress(seconds=0.0), PhaseBar()]
    for bar in bars:
        bar.disable()
        bar.watched = True
        bar.enable = lambda: None  # type: ignore[method-assign]
        fit(tmp_path, Scripted(Clock(), [4] * 6), bar)
    assert "update" not in capsys.readouterr().out


# ---- Lightning's own bars


@pytest.mark.parametrize("bar", [RichProgressBar(), TQDMProgressBar()], ids=["rich", "tqdm"])
def test_other_bars_get_phase_and_time_left(tmp_path: Path, bar: Any, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    beside = Beside(bar)
    beside.clock, beside.watched = clock, True
    seen: list[Any] = []

    class Looks(Scripted):
        def during(self, update: int) -> None:
            assert not update or "left" in column()  # as the bar itself has drawn it at the end of an update
            beside.redraw()
            seen.append(column() if update else None)

    def column() -> Any:
        return bar._metric_component._metrics if isinstance(bar, RichProgressBar) else str(bar._train_progress_bar)

    assert not beside.redraw()  # nothing runs yet
    fit(tmp_path, Looks(clock, [10, 4]), beside, bar, max_epochs=1, limit_train_batches=2)
    if isinstance(bar, RichProgressBar):
        assert {name: str(value) for name, value in seen[1].items()} == {
            "score": "0.0", "tok/s": "1234.4000244140625", "phase": "rollout 4 s", "left": "6 s",
        }  # fmt: skip
    else:
        for words in ("score=0.000", "phase=rollout 4 s", "left=6 s"):
            assert words in seen[1]


def test_a_story_alone_tells_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    story = Story()
    fit(tmp_path, Scripted(Clock(), [1] * 6), story, enable_progress_bar=False)
    assert "update" not in capsys.readouterr().out
    assert story.line() == "finishing fit"


# ---- what LitPPO tells


def test_litppo_says_what_it_is_at_and_how_far(tmp_path: Path, tiny_lm: Path):
    """Seven responses, minibatches of five, two passes: four steps; tokens up to the longest response's."""
    seen: list[tuple[str, str]] = []

    class Watched(LitPPO):
        @property
        def phase_detail(self) -> str:
            return seen[-1][1] if seen else ""

        @phase_detail.setter
        def phase_detail(self, detail: str) -> None:
            seen.append((self.phase, detail))
            assert (self.phase_since is not None) == bool(self.phase)

    class Lengths(L.Callback):
        def on_rollout_end(self, trainer: L.Trainer, module: LitPPO, experience: Any) -> None:
            seen.append(("longest", str(int(experience.response_mask.sum(1).max()))))

        def on_train_batch_start(self, *_: Any) -> None:
            seen.clear()

    bar = Told(Clock())
    trainer = make_trainer(tmp_path, callbacks=[bar, Lengths()], enable_progress_bar=True, max_steps=1)
    module = make_module(tiny_lm)
    module.__class__ = Watched
    trainer.fit(module, make_data(tmp_path))
    longest = int(next(detail for phase, detail in seen if phase == "longest"))
    assert 1 < longest <= 10
    assert seen[: seen.index(("rollout", "log-probs"))] == [("rollout", f"token {i + 1}/10") for i in range(longest)]
    assert [detail for phase, detail in seen if phase == "update"] == [f"step {i}/4" for i in (1, 2, 3, 4)]
    assert bar.lines[-1].startswith("update 1/1  score ")
    assert [word.split()[0] for word in bar.lines[-1].split("  ")][1:-1] == ["score", "kl", "length"]
    assert bar.lines[-1].endswith(" tok/s")
