"""Signs of life: what the command prints while nothing else is printed. No test waits for a second to pass."""

import threading
from pathlib import Path
from typing import Any

import pytest

from lit_ppo.console.heartbeat import Heartbeat
from tests.helpers.command import run_command
from tests.helpers.scripted import Clock


def simulated(quiet: float) -> tuple[Heartbeat, Clock]:
    heartbeat = Heartbeat(quiet)
    heartbeat.clock = clock = Clock()
    heartbeat.begin("starting")
    heartbeat.touch()
    return heartbeat, clock


def beats(heartbeat: Heartbeat, clock: Clock, n: int) -> None:
    for _ in range(n):
        clock.now += 1.0
        heartbeat.beat()


def test_silence_counts_from_what_was_printed_last(capsys: pytest.CaptureFixture[str]) -> None:
    heartbeat, clock = simulated(quiet=3.0)
    beats(heartbeat, clock, 2)
    heartbeat.say("loading", doing="loading libraries")
    beats(heartbeat, clock, 2)
    heartbeat.touch()
    beats(heartbeat, clock, 2)
    assert capsys.readouterr().out == "loading\n"
    beats(heartbeat, clock, 4)
    heartbeat.begin("reading")
    beats(heartbeat, clock, 3)
    assert capsys.readouterr().out == "loading libraries ... 5 s\nloading libraries ... 8 s\nreading ... 3 s\n"


def test_a_progress_bar_takes_the_place_of_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Until something else begins; an error in it ends nothing."""
    heartbeat, clock = simulated(quiet=1.0)
    ticks = []

    def tick() -> None:
        ticks.append(clock.now)
        raise RuntimeError("dictionary changed size during iteration")

    heartbeat.tick = tick
    beats(heartbeat, clock, 3)
    heartbeat.begin("writing")
    assert capsys.readouterr().out == ""
    beats(heartbeat, clock, 1)
    assert ticks == [1001.0, 1002.0, 1003.0]
    assert capsys.readouterr().out == "writing ... 1 s\n"


def test_a_thread_beats_until_the_end_unless_output_is_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    beaten = threading.Event()
    with Heartbeat() as heartbeat:
        heartbeat.tick = beaten.set
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "heartbeat")
        assert beaten.wait(timeout=60)
    thread.join(timeout=60)
    assert not thread.is_alive()
    with Heartbeat(quiet=0.0, enabled=False) as disabled:
        disabled.say("nothing")
        assert "heartbeat" not in [thread.name for thread in threading.enumerate()]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("option", "present", "absent"),
    [
        (None, ["step 8/8", "heartbeat shows the progress line", "8 steps in "], []),
        ("--trainer.enable_progress_bar=false", ["Run folder:"], ["step 0", "step 8", " ... ", "8 steps in "]),
        ("--trainer.callbacks+=lightning.pytorch.callbacks.RichProgressBar", ["8 steps in "], ["step 8/8"]),
    ],
    ids=["ours", "none", "rich"],
)
def test_bars_of_the_command(config: Path, tmp_path: Path, option: Any, present: list[str], absent: list[str]) -> None:
    options = [] if option is None else [option]
    ours = "--trainer.callbacks+=tests.helpers.cli_toys.Shout"
    out = run_command("fit", "--config", config, *options, ours, cwd=tmp_path).ok().out
    assert [words for words in present if words not in out] == []
    assert [words for words in absent if words in out] == []
