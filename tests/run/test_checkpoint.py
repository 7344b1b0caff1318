"""StepCheckpoint: what it keeps, what it replaces, and a full disk."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ppo.parallel.checkpoint_io import CheckpointError
from lit_ppo.run.checkpoint import StepCheckpoint, find_last
from tests.helpers.toys import make_data, make_module, make_trainer


def fit(folder: Path, actor: Path, updates: int, ckpt_path: Path | None = None, **checkpoint: Any) -> Any:
    module = make_module(actor)
    saving = StepCheckpoint(**{"every_n_train_steps": 1, "keep": 9, "dirpath": str(folder / "saved"), **checkpoint})
    trainer = make_trainer(folder, callbacks=[saving], max_steps=updates, enable_checkpointing=True)
    trainer.fit(module, make_data(folder), ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return module


@pytest.fixture
def saved(tmp_path: Path, tiny_lm: Path) -> Path:
    fit(tmp_path, tiny_lm, updates=1)
    return tmp_path / "saved" / "step-000001.ckpt"


@pytest.fixture
def small_disk() -> Any:
    """The system refuses to write a file beyond 20 kB: a checkpoint of the tiny models takes more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, tiny_lm: Path, saved: Path, small_disk: Any) -> None:
    before = saved.read_bytes()
    small_disk()
    with pytest.raises(CheckpointError, match=r"step-000002.ckpt: cannot be written \(File too large\); the previous"):
        fit(tmp_path, tiny_lm, updates=2, ckpt_path=saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert saved.read_bytes() == before


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, tiny_lm: Path) -> None:
    """Not even root can write below a file. It is said before the first rollout."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"StepCheckpoint\(dirpath=.*saved'\): cannot be written to \(Not a dir"):
        fit(tmp_path, tiny_lm, updates=1, dirpath=str(tmp_path / "file" / "saved"))


def test_going_back_keeps_what_is_written_last(tmp_path: Path, tiny_lm: Path) -> None:
    """Steps 1 to 3 are there, and the run resumes from step 1: its new step 2 is the newest, not the oldest.

    A new run in that folder removes and replaces nothing of it, even where its steps have the same names.
    """
    fit(tmp_path, tiny_lm, updates=3)
    first = tmp_path / "saved" / "step-000001.ckpt"
    fit(tmp_path, tiny_lm, updates=2, ckpt_path=first, keep=2)
    assert find_last(tmp_path, str(first.parent)).name == "step-000002.ckpt"
    assert sorted(path.name for path in first.parent.iterdir()) == ["step-000002.ckpt", "step-000003.ckpt"]
    first.with_name("step-000009.ckpt.partial").touch()  # as killed runs leave them: a file,
    first.with_name("step-000009.ckpt").mkdir()  # and a sharded checkpoint without its metadata
    assert find_last(tmp_path, str(first.parent)).name == "step-000002.ckpt"
    before = {path: path.stat().st_mtime_ns for path in first.parent.iterdir()}
    fit(tmp_path, tiny_lm, updates=2, keep=1)  # from the start: steps 1 and 2 once more
    assert {path: path.stat().st_mtime_ns for path in before} == before
    new = find_last(tmp_path, str(first.parent))
    assert set(first.parent.iterdir()) - before.keys() == {new}
    assert new.name == "step-000002-v1.ckpt"
    fit(tmp_path, tiny_lm, updates=3, ckpt_path=new, keep=1)  # the same run: its own goes
    assert not new.exists()
    assert find_last(tmp_path, str(first.parent)).name == "step-000003-v1.ckpt"


def test_a_second_run_with_the_same_callback_is_saved_too(tmp_path: Path, tiny_lm: Path) -> None:
    """A notebook's cell run again: it ends at the step that the first one saved last."""
    saving = StepCheckpoint(dirpath=str(tmp_path / "saved"))
    for seed in (3, 4):
        module = make_module(tiny_lm, seed=seed)
        trainer = make_trainer(tmp_path, callbacks=[saving], max_steps=1, enable_checkpointing=True)
        trainer.fit(module, make_data(tmp_path))
    state = torch.load(tmp_path / "saved" / "step-000001.ckpt", weights_only=True)["state_dict"]
    assert all(value.equal(module.state_dict()[name]) for name, value in state.items())
