"""The progress line on a clock of the test's own: what it says, when it is shown, and the time left by hand."""

import io
import logging
import pickle
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lit_ppo.callbacks import CollapseMonitor
from lit_ppo.console.heartbeat import Heartbeat
from lit_ppo.console.progress import ProgressLine, progress_bar
from lit_ppo.console.summary import RunSummary
from tests.helpers.scripted import Automatic, Clock, Scripted, fit
from tests.helpers.spies import Spy
from tests.helpers.toys import make_data, make_module, make_trainer, write_prompts

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Lines(ProgressLine):
    """Keeps a line for everything that happens."""

    def __init__(self) -> None:
        super().__init__(Heartbeat(enabled=False))
        self.clock, self.lines = Clock(), []

    def show(self, *, force: bool = False) -> None:
        self.lines.append(self.line())

    @property
    def positions(self) -> list[str]:
        return list(dict.fromkeys(line.split("  ")[0] for line in self.lines))


def run(
    folder: Path,
    bar: Any,
    seconds: list[float],
    *callbacks: Any,
    during: Callable[[Any], None] | None = None,
    **options: Any,
) -> list[str]:
    """Updates that take ``seconds``; gives the lines, if the bar keeps them."""
    if not isinstance(bar, Lines):
        bar.clock = Clock()
    module = Scripted(bar.clock, seconds)
    if during is not None:
        module.during = lambda update: during(module)  # type: ignore[method-assign]
    fit(folder, module, bar, *callbacks, **{"max_epochs": 1, **options})
    return getattr(bar, "lines", [])


# ---- what the line says


def test_a_run_in_mid_update_says_phase_how_long_and_how_far(tmp_path: Path):
    bar = Lines()

    def looks(module: Any) -> None:
        module.progress.detail = "token 5/32"
        bar.show()
        module.progress = SimpleNamespace(phase="score", since=module.clock.now, detail="")
        module.clock.now += 2.0
        bar.show()
        module.progress = "a name that is used for something else: there is the time in the step"
        bar.show()

    lines = run(tmp_path, bar, [9, 69, 0.4], during=looks)
    assert [line for line in lines if "(" in line] == [
        *(f"update 0/3  ({phase})" for phase in ("rollout 9 s, token 5/32", "score 2 s", "11 s")),
        "update 1/3  score 0  tok/s 1,234  (rollout 1 min 9 s, token 5/32)",
        "update 1/3  score 0  tok/s 1,234  (score 2 s)",
        "update 1/3  score 0  tok/s 1,234  (1 min 11 s)",
        "update 2/3  score 1  tok/s 1,234  (rollout, token 5/32)  1 min 11 s left",  # 71 - 0.4
        "update 2/3  score 1  tok/s 1,234  (score 2 s)  1 min 9 s left",
        "update 2/3  score 1  tok/s 1,234  (2 s)  1 min 9 s left",
    ]


def test_validation_counts_its_batches_and_stops_the_clock(tmp_path: Path):
    """Of its own 100 s a batch none count: after updates of 4 and 6 s, one of 6 is left."""
    bar = Lines()

    class Measures(Scripted):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.clock.now += 100.0
            bar.show()
            self.log("val/score", float(self.trainer.global_step), prog_bar=True)

    options = {"limit_val_batches": 2, "val_check_interval": 1, "num_sanity_val_steps": 1}
    fit(tmp_path, Measures(bar.clock, [4, 6, 5]), bar, max_epochs=1, **options)
    assert bar.positions[:3] == ["sanity check 0/1", "sanity check 1/1", "update 0/3"]
    assert "update 0/3" in bar.lines  # without the score of the sanity check
    assert "validate 1/2  score 1  tok/s 1,234  val/score 2  (1 min 40 s)  6 s left" in bar.lines
    assert "update 2/3  score 1  tok/s 1,234  val/score 2  6 s left" in bar.lines  # measured after one update
    assert bar.lines[-1] == "update 3/3  score 2  tok/s 1,234  val/score 6"


def test_the_total_and_the_time_left_are_those_of_the_run(tmp_path: Path):
    """Two steps an update, known after the first, make two updates of four steps.

    The first update does not count: after one of 1000 s and 20 of 2 s, three are left. Resumed after two updates of
    50 s, of 10, 20, 15 and 15 s: after the fourth, two of 20 s are left.
    """
    bar = Lines()
    run(tmp_path, bar, [1] * 9, max_epochs=-1, max_steps=4)
    assert bar.positions == [f"update {position}" for position in ("0/4", "1/2", "2/2")]
    lines = run(tmp_path, Lines(), [1000] + [2] * 23, max_epochs=8)
    assert "update 21/24  score 20  tok/s 1,234  6 s left" in lines
    two = {"limit_train_batches": 2}
    fit(tmp_path, Scripted(Clock(), [50] * 2), max_epochs=1, **two).save_checkpoint(tmp_path / "two.ckpt")
    lines = run(tmp_path, Lines(), [0, 0, 10, 20, 15, 15], max_epochs=3, resume=tmp_path / "two.ckpt", **two)
    assert lines[:2] == ["update 2/6", "update 3/6  score 2  tok/s 1,234"]
    assert lines[2] == "update 4/6  score 3  tok/s 1,234  40 s left"


def test_accumulated_batches_make_one_step(tmp_path: Path):
    """Two steps an epoch of three batches, of 10 s each; after two, two steps of 20 s are left."""

    class Timed(Automatic):
        def on_train_batch_start(self, *_: Any) -> None:
            bar.clock.now += 10.0

    bar: Any = Lines()
    fit(tmp_path, Timed(), bar, accumulate_grad_batches=2)
    assert bar.positions == [f"step {n}/4" for n in range(5)]
    assert next(line for line in bar.lines if line.startswith("step 2/4")).endswith("  40 s left")


@pytest.mark.filterwarnings("ignore:CollapseMonitor")
def test_litppo_says_what_it_does_and_what_it_has_done(tmp_path: Path, tiny_lm: Path, capsys: Any):
    """Seven responses, minibatches of five, two passes: four steps; no length but the first is fine."""
    bar = Lines()

    class Steps(L.Callback):
        def on_minibatch_end(self, *_: Any) -> None:
            bar.show()

    callbacks = [bar, Steps(), CollapseMonitor(length=(1.0001, 99.0)), RunSummary()]
    trainer = make_trainer(tmp_path, callbacks=callbacks, enable_progress_bar=True, max_steps=2)
    trainer.fit(make_module(tiny_lm), make_data(tmp_path, val_path=str(write_prompts(tmp_path / "val.jsonl", 5))))
    assert re.findall(r"update 0/2  \(update, (step \d)", "\n".join(bar.lines)) == [f"step {n}" for n in (1, 2, 3, 4)]
    names = ["score", "kl", "length", "tok/s"]
    assert [word.split()[0] for word in bar.lines[-1].split("  ")] == ["update", *names]
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["2", *names, "CollapseMonitor:"]
    assert re.fullmatch(r"  score \S+ -> \S+  \(held-out \S+ -> \S+\)", lines[1])
    assert lines[-1] == "CollapseMonitor: warning at update 2 (length)."


# ---- a pipe


def test_a_pipe_gets_the_first_line_the_last_and_one_every_five_seconds(tmp_path: Path, capsys: Any):
    """After two of six updates four of 8 s are left, after five one of 2.5 s: 8 s count as 2 (1 + 4 / 4)."""
    bar = progress_bar(Heartbeat(enabled=False))
    run(tmp_path, bar, [4, 8, 2, 2, 2, 6], max_epochs=2)
    stop = Spy("on_train_batch_end", lambda module, *_: setattr(module.trainer, "should_stop", True))
    run(tmp_path, bar, [1] * 9, stop, max_epochs=-1)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("update")] == [
        "update 0/6",
        "update 2/6  score 1  tok/s 1,234  32 s left",
        "update 5/6  score 4  tok/s 1,234  2 s left",
        "update 6/6  score 5  tok/s 1,234",
        "update 0",
        "update 1  score 0  tok/s 1,234",
    ]


# ---- signs of life


def test_the_commands_heartbeat_shows_the_line_while_a_loop_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    heartbeat = Heartbeat(quiet=0.0, enabled=False)

    class Waits(L.Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            heartbeat.beat()
            assert capsys.readouterr().out.startswith("preparing to fit ... ")

    def beats(_: Any) -> None:
        capsys.readouterr()
        heartbeat.beat()

    run(tmp_path, progress_bar(heartbeat), [7], Waits(), during=beats, limit_train_batches=1)
    assert capsys.readouterr().out.startswith("update 0/1  (rollout 7 s)\n")
    heartbeat.beat()
    assert capsys.readouterr().out.startswith("finishing fit ... ")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bar_outside_the_command_has_a_heartbeat_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: int
):
    """On the first process; the others are silent."""
    monkeypatch.setattr(L.Trainer, "is_global_zero", rank == 0)
    running: list[threading.Thread] = []

    def looks(_: Any) -> None:
        running.extend(thread for thread in threading.enumerate() if thread.name == "heartbeat")

    bar = pickle.loads(pickle.dumps(progress_bar(Heartbeat())))  # as launchers copy it to other processes
    run(tmp_path, bar, [4], during=looks, limit_train_batches=1)
    assert len(running) == 1 - rank
    assert ("update 1/1" in capsys.readouterr().out) == (rank == 0)
    for thread in running:
        thread.join(timeout=60)
        assert not thread.is_alive()


# ---- a terminal


class Screen(io.StringIO):
    """A terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True

    @property
    def frames(self) -> list[str]:
        return [frame.strip() for frame in self.getvalue().split("\r")]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[Screen, ProgressLine]]:
    """Makes one of so many columns, and its bar; tqdm does not learn its size."""

    def make(columns: int) -> tuple[Screen, ProgressLine]:
        screen = Screen()
        monkeypatch.setattr("sys.stdout", screen)
        monkeypatch.setattr("sys.stderr", screen)
        monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: SimpleNamespace(columns=columns))
        monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (-1, -1))
        return screen, progress_bar(Heartbeat(enabled=False))

    return make


def test_a_terminal_has_one_line_for_the_run(tmp_path: Path, terminal: Any):
    """Three of six updates fill half of the ten columns."""
    screen, bar = terminal(120)
    run(tmp_path, bar, [4, 8, 6, 6, 6, 6], max_epochs=2, limit_val_batches=2)
    assert "update 3/6  score 2  tok/s 1,234  21 s left  █████" in screen.frames
    assert "validate 1/2  score 2  tok/s 1,234  21 s left  █████" in screen.frames
    assert "update 6/6  score 5  tok/s 1,234  ██████████" in screen.frames
    drawn = screen.getvalue()[screen.getvalue().index("update 0/6") :]
    assert drawn.split("`Trainer.fit` stopped")[0].count("\n") == 0
    with pytest.raises(IndexError):  # an error ends the line
        run(tmp_path, bar, [4])
    bar.show(force=True)
    assert screen.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (43, "update 2/3  score 1  tok/s 1,234  8 s left"),  # 42 columns; a terminal wraps a line of its own width
        (30, "update 2/3  score 1  8 s left"),
        (29, "update 2/3  8 s left"),
        (7, "update"),
    ],
)
def test_a_narrow_terminal_gets_the_words_that_fit(tmp_path: Path, terminal: Any, columns: int, words: str):
    screen, bar = terminal(columns)
    run(tmp_path, bar, [4, 8, 6])
    frames = [frame for frame in screen.frames if frame.startswith("update")]
    assert words in frames
    assert max(len(frame.splitlines()[0]) for frame in frames) < columns


def test_messages_stand_above_the_line(tmp_path: Path, terminal: Any, monkeypatch: pytest.MonkeyPatch):
    screen, bar = terminal(100)
    handlers = [logging.StreamHandler(screen)]
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", handlers)

    def warns(module: Any) -> None:
        warnings.showwarning("the policy collapses", UserWarning, "file", 1)
        logging.getLogger("lightning.pytorch").warning("says Lightning")
        module.print("says the module")

    with warnings.catch_warnings():
        before = warnings.showwarning
        run(tmp_path, bar, [4], during=warns, limit_train_batches=1)
        assert warnings.showwarning is before
    assert logging.getLogger("lightning.pytorch").handlers is handlers
    for message in ("file:1: UserWarning: the policy collapses\n", "says Lightning\n", "says the module\n"):
        before_it, after_it = screen.getvalue().split(message)
        assert before_it.endswith(("\r", "\n"))  # nothing else stands in that line
        assert "update 0/1" in after_it  # the line is drawn again


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_the_line_ends_before_results_are_printed(tmp_path: Path, terminal: Any, name: str):
    """Lightning prints them between the end of the loop and ``teardown``; batches of all sets are counted."""
    screen, bar = terminal(100)
    ends = []

    class Every(Scripted):
        def on_validation_end(self) -> None:
            ends.append(screen.getvalue()[-1])

        on_test_end = on_predict_end = on_validation_end

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            bar.seconds = 0.0
            return batch

        test_step = predict_step = validation_step

    trainer = L.Trainer(callbacks=[bar], logger=False, accelerator="cpu", default_root_dir=tmp_path)
    getattr(trainer, name)(Every(Clock(), []), [DataLoader(torch.zeros(n, 1)) for n in (2, 3)])  # type: ignore[arg-type]
    assert f"{name} 5/5  ██████████" in screen.frames
    assert ends == ["\n"]
