"""A rank that dies is named, with how it ended; the process that has started it ends with exit code 1."""

import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.plugins.environments import LightningEnvironment

from lit_ppo.parallel import lost_ranks
from lit_ppo.parallel.lost_ranks import WatchingLauncher, explain, lost_rank, watch_instead_of_lightning

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
GLOO = "[/__w/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:3474: Connection reset by peer"
WELL, KILLED, FAILED = "exec sleep 600", "kill -9 $$", "exit 3"


@pytest.fixture
def ranks() -> Any:
    """Starts processes."""
    started: list[Any] = []

    def start(*commands: str) -> list[Any]:
        started[:] = [subprocess.Popen(["sh", "-c", command]) for command in commands]
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A place for exit codes, with which this process would have ended; and whether one is there."""
    codes, now = [], threading.Event()
    monkeypatch.setattr(lost_ranks, "PATIENCE", 0.0)
    monkeypatch.setattr(lost_ranks.os, "_exit", lambda code: (codes.append(code), now.set()))
    return codes, now


@pytest.mark.parametrize(
    ("commands", "words"),
    [
        ([WELL, "exit 0"], ""),
        ([WELL, KILLED], r"rank 2 (process {pid}) was killed by SIGKILL, perhaps for lack of memory"),
        ([WELL, FAILED, KILLED], r"rank 2 (process {pid}) ended with exit code 3; its own error is above"),
    ],
)
def test_the_first_rank_that_failed_is_named(ranks: Any, commands: list[str], words: str) -> None:
    processes = ranks(*commands)
    for process in processes[1:]:
        process.wait()
    assert lost_rank(processes) == words.format(pid=processes[1].pid)


def test_only_lost_connections_are_explained(ranks: Any) -> None:
    processes = ranks(KILLED)
    of_ours = RuntimeError("rank 0 got no answer from the other ranks")
    of_ours.__cause__ = RuntimeError(GLOO)
    for error in (RuntimeError(GLOO), of_ours):
        text = explain(error, processes)
        assert text is not None
        assert text.startswith(f"rank 1 (process {processes[0].pid}) was killed by SIGKILL")
        assert "gloo" not in text
        assert explain(error, []) is None  # there are no ranks
    assert explain(RuntimeError("cannot restore the store"), processes) is None


def test_a_process_that_waits_for_a_lost_rank_ends(ranks: Any, ended: Any, capfd: pytest.CaptureFixture[str]) -> None:
    codes, now = ended
    launcher = WatchingLauncher(LightningEnvironment(), 3, 1)
    launcher._call_children_scripts = lambda: setattr(launcher, "procs", ranks(KILLED, WELL))
    launcher.launch(lambda: now.wait(60))
    assert codes == [1]
    assert launcher.procs[1].wait(60) == -9
    assert f"rank 1 (process {launcher.procs[0].pid}) was killed by SIGKILL" in capfd.readouterr().err


def test_lightnings_observer_kills_nobody_with_sigkill(ranks: Any, ended: Any, tmp_path: Path) -> None:
    """Where a script has made the Trainer, and Lightning's launcher started the ranks."""
    codes, now = ended
    failed, us = ranks(f"while [ ! -e {tmp_path}/now ]; do sleep 0.05; done; {KILLED}", WELL)
    _ChildProcessObserver(us.pid, [failed], sleep_period=1).start()
    watch_instead_of_lightning()
    (tmp_path / "now").touch()
    assert now.wait(60)
    assert codes == [1]
    assert us.poll() is None
