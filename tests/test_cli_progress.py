"""Signs of life: what is printed while nothing else is, and what a line says."""

import time
from pathlib import Path

import pytest

from lit_ppo.heartbeat import Heartbeat
from tests.command import Running
from tests.test_cli import config  # noqa: F401  a fixture


def test_a_line_when_nothing_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    with Heartbeat(quiet=0.5) as heartbeat:
        heartbeat.say("loading", doing="loading libraries")
        time.sleep(2.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loading"
    assert lines[1].startswith("loading libraries ... ")
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
    assert command.result(1).ok().out.count("step 0/1 (update) ... ") >= 1
    assert longest < 10
