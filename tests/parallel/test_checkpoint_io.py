"""Checkpoint files that are complete or absent, and checkpoints that cannot be read."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_ppo.parallel import checkpoint_io
from lit_ppo.parallel.checkpoint_io import (
    AtomicCheckpointIO,
    CheckpointError,
    atomic_path,
    read_summary,
    save_checked,
    use_atomic_checkpoints,
)
from tests.helpers.traps import Trap


def test_files_and_folders_are_replaced(tmp_path: Path) -> None:
    """As a whole; names that a person might use are left alone, and so is the folder itself."""
    others = [
        "file.old",
        "file.partial",
        "folder.old",
        "folder.old.partial",
        "folder.partial",
        "folder.12345678.partial",
    ]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").touch()
    for content in ("old", "new"):
        with atomic_path(tmp_path / "file") as partial:
            partial.write_text(content)
        with atomic_path(tmp_path / "folder") as partial:
            assert not partial.exists()
            partial.mkdir()
            (partial / content).touch()
    assert (tmp_path / "file").read_text() == "new"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["file", "folder", *others])
    assert all((tmp_path / name / "thesis.tex").exists() for name in others)


def test_a_failure_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")

    def fill(target: Path) -> None:
        with atomic_path(target) as partial:
            partial.write_text("half")
            raise OSError("full")

    for name in ("file", "folder"):
        with pytest.raises(OSError, match="full"):
            fill(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is synced, with its size at that time, and what is renamed, in order."""
    events: list[tuple[Any, ...]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("sync", path.name, None if path.is_dir() else path.stat().st_size))
        fsync(descriptor)

    def replaced(old: Any, new: Any) -> None:
        events.append(("rename", Path(old).name, Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return events


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files")
def test_bytes_are_on_the_disk_before_they_have_their_name_and_the_name_right_after(tmp_path: Path, disk: Any) -> None:
    """Else a power cut leaves a name with half a file behind it, or the new file without its name."""
    path = tmp_path / "saved" / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(99)}, path)
    size = path.stat().st_size
    assert disk == [("sync", "new", size), ("rename", "new", "x.ckpt"), ("sync", "saved", None)]
    disk.clear()
    with atomic_path(tmp_path / "model") as folder:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "weights").write_bytes(b"three")
    inside = [("sync", "inner", None), ("sync", "weights", 5), ("sync", "new", None)]
    assert disk == [*inside, ("rename", "new", "model"), ("sync", tmp_path.name, None)]


INTERRUPTED = """
import signal, sys, torch
from lit_ppo.parallel.checkpoint_io import AtomicCheckpointIO

def interrupt(frame, event, argument):
    if frame.f_code.co_name == sys.argv[2] and frame.f_code.co_filename == torch.serialization.__file__:
        sys.settrace(None)
        signal.raise_signal(signal.SIGINT)

torch.save({}, sys.argv[1] + "/loaded")
sys.settrace(interrupt)
try:
    AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(99)}, sys.argv[1] + "/x.ckpt")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("function", ["__enter__", "_save", "__exit__"])
def test_an_interrupt_while_torch_writes_does_not_abort_the_process(tmp_path: Path, function: str) -> None:
    """As torch's writer does if it goes after its file is closed."""
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), function]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "interrupted\n", "")
    assert not (tmp_path / "x.ckpt").exists()


def test_the_users_own_plugin_is_left_alone() -> None:
    class Own(TorchCheckpointIO):
        """As given to ``Trainer(plugins=...)``."""

    for given, used in ((TorchCheckpointIO(), AtomicCheckpointIO), (Own(), Own)):
        trainer: Any = SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=given))
        use_atomic_checkpoints(trainer)
        assert type(trainer.strategy.checkpoint_io) is used


CHECKPOINT = {"state_dict": {"weight": torch.zeros(3)}, "pytorch-lightning_version": "2.6.0"}
DAMAGED = "cannot be read, it is damaged"
UNREADABLE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-400]), ".* is damaged: File is not a zip file"),
    "empty": (lambda path: path.write_bytes(b""), DAMAGED),
    "no checkpoint": (lambda path: path.write_text("hello"), DAMAGED),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)), DAMAGED),
    "foreign": (
        lambda path: torch.save({"model": torch.zeros(3)}, path),
        "not a training checkpoint; missing: state_dict, pytorch-lightning_version",
    ),
    "code": (
        lambda path: torch.save({**CHECKPOINT, "trap": Trap()}, path),
        "holds more than plain data, and reading it would run code",
    ),
}


@pytest.mark.parametrize(("harm", "words"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-000001.ckpt"
    torch.save(CHECKPOINT, path)
    for read in (read_summary, AtomicCheckpointIO().load_checkpoint):
        assert read(path)["state_dict"]["weight"].tolist() == [0, 0, 0]
    harm(path)
    for read in (read_summary, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(CheckpointError, match=f"step-000001.ckpt: {words}"):
            read(path)
    assert not Path("sprung").exists()


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_takes_effect_once_a_checkpoint_is_written_and_twice_at_once(tmp_path: Path, times: int) -> None:
    """A sharded one is written by torch, which may abort the process if its writer is interrupted."""

    class Strategy:
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Path) -> None:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            path.write_text("complete")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        save_checked(Strategy(), {}, tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").exists() == (times == 1)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_does_not_wait_long_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_io, "HELD", 0.1)

    class Strategy:
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Path) -> None:
            signal.raise_signal(signal.SIGINT)
            threading.Event().wait(60)
            path.write_text("complete")

    with pytest.raises(KeyboardInterrupt):
        save_checked(Strategy(), {}, tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


def test_a_failed_checkpoint_fails_as_such_after_ctrl_c(tmp_path: Path) -> None:
    class Strategy:
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Path) -> None:
            signal.raise_signal(signal.SIGINT)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checked(Strategy(), {}, tmp_path / "a.ckpt")
