"""Signs of life: what is printed while nothing else is, and what a line says."""

import re
import time
from pathlib import Path

import pytest

from lit_ppo.heartbeat import Heartbeat
from lit_ppo.progress import LineProgress, PhaseBar, progress_bar
from tests.command import Running, run_command
from tests.test_cli import config  # noqa: F401  a fixture


def test_a_line_when_nothing_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    with Heartbeat(quiet=0.5) as heartbeat:
        heartbeat.say("loading", doing="loading libraries")
        time.sleep(2.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loading"
    assert re.fullmatch(r"loading libraries \.\.\. \d s", lines[1])
    time.sleep(1.5)
    assert capsys.readouterr().out == ""  # it has ended


def test_silent_while_others_speak_and_where_output_is_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    with Heartbeat(quiet=2.5) as heartbeat, Heartbeat(quiet=0.1, enabled=False) as disabled:
        disabled.say("nothing")
        for _ in range(8):
            heartbeat.touch()
            time.sleep(0.4)
    assert capsys.readouterr().out == ""


def test_what_is_described_may_fail(capsys: pytest.CaptureFixture[str]) -> None:
    with Heartbeat(quiet=0.1) as heartbeat:
        heartbeat.doing = lambda: str(1 / 0)
        time.sleep(1.5)
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_never_ten_seconds_of_silence(config: Path, tmp_path: Path) -> None:  # noqa: F811
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


def test_time_is_that_of_what_is_going_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Not that since the start; whoever describes himself tells his own."""
    with Heartbeat(quiet=0.5) as heartbeat:
        time.sleep(1.6)
        heartbeat.doing = "reading"
        time.sleep(2.2)
        heartbeat.doing = lambda: "update 3/4"
        time.sleep(1.2)
    lines = capsys.readouterr().out.splitlines()
    told = [re.fullmatch(r"(\w+)[\w/ ]* \.\.\.(?: (\d) s)?", line) for line in lines]
    found = [(match[1], int(match[2] or 0)) for match in told if match]
    assert len(found) == len(lines)
    assert all(seconds <= 2 for _, seconds in found)  # of 5 in all
    assert {"starting", "reading"} == {name for name, seconds in found if seconds}
    assert found[-1] == ("update", 0)


def test_without_a_progress_bar_there_are_no_signs_of_progress(config: Path, tmp_path: Path) -> None:  # noqa: F811
    """One step takes longer than the heartbeat waits; neither is there a summary."""
    options = ["--trainer.enable_progress_bar=false", "--model.sleep=8", "--trainer.max_steps=1"]
    quiet = run_command("fit", "--config", config, *options, cwd=tmp_path).ok().out
    assert [word for word in ("step 0", "step 1", " ...", "loss", " in ") if word in quiet] == []
    assert "Run folder:" in quiet


def test_richs_bar_is_the_only_one(config: Path, tmp_path: Path) -> None:  # noqa: F811
    """In a pipe it prints its last state; our lines are not there, our summary is."""
    rich = "--trainer.callbacks+=lightning.pytorch.callbacks.RichProgressBar"
    out = run_command("fit", "--config", config, rich, cwd=tmp_path).ok().out
    assert "step 8/8" not in out
    assert "8 steps in " in out


def test_lines_are_for_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, kind in ((True, PhaseBar), (False, LineProgress)):
        monkeypatch.setattr("sys.stdout.isatty", lambda answer=terminal: answer)
        assert type(progress_bar()) is kind
