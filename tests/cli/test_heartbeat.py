"""Signs of life: what is printed while nothing else is, and what a line says."""

import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_ppo.cli.heartbeat import Heartbeat
from lit_ppo.cli.progress import LineProgress, PhaseBar, progress_bar
from tests.helpers.command import Running, run_command
from tests.helpers.scripted import Clock


def test_a_line_when_nothing_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    with Heartbeat(quiet=0.5) as heartbeat:
        heartbeat.say("loading", doing="loading libraries")
        time.sleep(2.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loading"
    assert re.fullmatch(r"loading libraries \.\.\. \d s", lines[1])
    time.sleep(1.5)
    assert capsys.readouterr().out == ""  # it has ended


class Simulated(Heartbeat):
    """Its second passes at once, and only while it waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, quiet: float) -> None:
        self.clock = Clock()
        monkeypatch.setattr("lit_ppo.cli.heartbeat.time", SimpleNamespace(monotonic=self.clock))
        super().__init__(quiet)

    def beat(self, seconds: int) -> None:
        """Watch so long."""
        end = self.clock.now + seconds

        def wait(second: float) -> bool:
            if self.clock.now == end:
                return True
            self.clock.now += second
            return False

        self._done = SimpleNamespace(wait=wait)  # type: ignore[assignment]
        self._watch()


def test_silence_counts_from_what_was_printed_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat = Simulated(monkeypatch, quiet=3.0)
    heartbeat.beat(2)
    heartbeat.say("loading", doing="loading libraries")
    heartbeat.beat(2)
    heartbeat.touch()
    heartbeat.beat(2)
    assert capsys.readouterr().out == "loading\n"
    heartbeat.beat(1)
    assert capsys.readouterr().out == "loading libraries ... 5 s\n"
    heartbeat.beat(2)
    assert capsys.readouterr().out == ""
    heartbeat.beat(1)
    assert capsys.readouterr().out == "loading libraries ... 8 s\n"


def test_what_is_drawn_is_a_sign_of_life(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = Simulated(monkeypatch, quiet=3.0)
    heartbeat.redraw = lambda: True
    heartbeat.beat(10)
    heartbeat.redraw = lambda: False
    heartbeat.beat(2)
    assert capsys.readouterr().out == ""
    heartbeat.beat(1)
    assert capsys.readouterr().out == "starting ... 13 s\n"


def test_silent_where_output_is_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())
    with Heartbeat(quiet=0.1, enabled=False) as disabled:
        disabled.say("nothing")
        assert set(threading.enumerate()) <= before
    assert capsys.readouterr().out == ""


def test_what_is_described_may_fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line now and then all the same, and none for every drawing that fails."""

    def fails() -> Any:
        raise RuntimeError("dictionary changed size during iteration")

    heartbeat = Simulated(monkeypatch, quiet=3.0)
    heartbeat.doing = heartbeat.redraw = fails
    heartbeat.beat(7)
    assert capsys.readouterr().out == "working (RuntimeError while asking for details) ...\n" * 2


def test_never_ten_seconds_of_silence(config: Path, tmp_path: Path) -> None:
    """One step takes longer than that."""
    command = Running("fit", "--config", config, "--model.sleep=11", "--trainer.max_steps=1", cwd=tmp_path)
    last, size, longest = time.monotonic(), 0, 0.0
    while command.process.is_alive():
        now = time.monotonic()
        if len(command.out) != size:
            last, size = now, len(command.out)
        longest = max(longest, now - last)
        time.sleep(0.1)
    assert re.search(r"step 0/1  \(update [67] s\) \.\.\.\n", command.result(1).ok().out)
    assert longest < 10


def test_time_is_that_of_what_is_going_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that since the start; whoever describes himself tells his own."""
    heartbeat = Simulated(monkeypatch, quiet=1.0)
    heartbeat.beat(2)
    heartbeat.doing = "reading"
    heartbeat.beat(2)
    heartbeat.doing = lambda: "update 3/4"
    heartbeat.beat(1)
    heartbeat.redraw = lambda: setattr(heartbeat, "doing", "writing") is not None  # has only just begun
    heartbeat.beat(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["starting ... 1 s", "starting ... 2 s", "reading ... 1 s", "reading ... 2 s"]
    assert lines[4:] == ["update 3/4 ...", "writing ..."]


def test_without_a_progress_bar_there_are_no_signs_of_progress(config: Path, tmp_path: Path) -> None:
    """One step takes longer than the heartbeat waits; neither is there a summary."""
    options = ["--trainer.enable_progress_bar=false", "--model.sleep=8", "--trainer.max_steps=1"]
    quiet = run_command("fit", "--config", config, *options, cwd=tmp_path).ok().out
    assert [word for word in ("step 0", "step 1", " ...", "loss", " in ") if word in quiet] == []
    assert "Run folder:" in quiet


def test_richs_bar_is_the_only_one(config: Path, tmp_path: Path) -> None:
    """In a pipe it prints its last state; our lines are not there, our summary is."""
    rich = "--trainer.callbacks+=lightning.pytorch.callbacks.RichProgressBar"
    out = run_command("fit", "--config", config, rich, cwd=tmp_path).ok().out
    assert "step 8/8" not in out
    assert "8 steps in " in out


def test_lines_are_for_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, kind in ((True, PhaseBar), (False, LineProgress)):
        monkeypatch.setattr("sys.stdout.isatty", lambda answer=terminal: answer)
        assert type(progress_bar()) is kind
