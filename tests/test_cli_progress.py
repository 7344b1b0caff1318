"""Signs of life: what is printed while nothing else is, and what a line says."""

import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from lit_ppo.heartbeat import Heartbeat
from lit_ppo.progress import LineProgress, PhaseBar, progress_bar
from tests.cli_toys import Toy, ToyData
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


def test_the_bar_of_a_terminal_names_the_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redrawn from outside while a step is running."""
    seen: list[str] = []

    class Watched(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.phase = "rollout"
            assert bar.redraw()
            seen.append(str(bar.train_progress_bar))
            return loss

    bar = PhaseBar()
    monkeypatch.chdir(tmp_path)
    L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[bar],
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    ).fit(Watched(), ToyData())  # fmt: skip
    assert "phase=rollout" in seen[0]
    assert "loss=" in seen[1]
    assert "train/loss" not in seen[1]


def test_lines_are_for_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, kind in ((True, PhaseBar), (False, LineProgress)):
        monkeypatch.setattr("sys.stdout.isatty", lambda answer=terminal: answer)
        assert type(progress_bar()) is kind
