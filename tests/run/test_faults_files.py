"""Checkpoints that cannot be written or read, and files that would run code."""

import json
import os
import pickle
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_ppo.models.actor_critic import load_causal_lm, load_critic, load_tokenizer
from lit_ppo.parallel.checkpoint_io import CheckpointError, WholeFiles, put_in_place, read_summary, use_whole_files
from lit_ppo.rewards import RewardModel
from lit_ppo.run.checkpoint import StepCheckpoint, find_last
from tests.helpers.command import run_command
from tests.helpers.ppo_command import ppo
from tests.helpers.tiny import make_causal_lm, make_reward_model
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


def test_no_room_for_a_checkpoint(tmp_path: Path, tiny_lm: Path, saved: Path, small_disk: Any) -> None:
    whole = saved.read_bytes()
    small_disk()
    with pytest.raises(CheckpointError, match=r"step-000002.ckpt: cannot be written \(File too large\); the earlier"):
        fit(tmp_path, tiny_lm, updates=2, ckpt_path=saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert saved.read_bytes() == whole


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, tiny_lm: Path) -> None:
    """Not even root can write below a file."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/saved/step-000001.ckpt: cannot be written \(Not a directory\)"):
        fit(tmp_path, tiny_lm, updates=1, dirpath=str(tmp_path / "file" / "saved"))


def test_a_checkpoint_that_is_there_is_replaced_in_one_step(tmp_path: Path, saved: Path) -> None:
    newer = saved.with_name("newer.partial")
    newer.write_bytes(b"newer")
    put_in_place(newer, saved)
    assert saved.read_bytes() == b"newer"
    folder, partial = tmp_path / "sharded", tmp_path / "sharded.partial"
    for path in (folder, partial):
        path.mkdir()
        (path / "name").write_text(path.name)
    put_in_place(partial, folder)
    assert (folder / "name").read_text() == "sharded.partial"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is brought to the disk, with its size by then, and what is renamed, in turn."""
    told: list[tuple[Any, ...]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        told.append(("sync", path.name, None if path.is_dir() else path.stat().st_size))
        fsync(descriptor)

    def replaced(old: Any, new: Any) -> None:
        told.append(("rename", Path(old).name, Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return told


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files")
def test_bytes_are_on_the_disk_before_they_have_the_name_and_the_name_right_after(tmp_path: Path, disk: Any) -> None:
    """Else a power cut leaves a checkpoint's name with half a file behind it, or the new file without its name."""
    path = tmp_path / "saved" / "x.ckpt"
    WholeFiles().save_checkpoint({"weight": torch.zeros(99)}, path)
    size = path.stat().st_size
    assert disk == [("sync", "x.ckpt.partial", size), ("rename", "x.ckpt.partial", "x.ckpt"), ("sync", "saved", None)]
    disk.clear()
    put_in_place(path, tmp_path / "saved" / "y.ckpt")
    assert disk == [("sync", "x.ckpt", size), ("rename", "x.ckpt", "y.ckpt"), ("sync", "saved", None)]
    folder = tmp_path / "z.ckpt.partial"  # as sharding strategies write
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "0.distcp").write_bytes(b"three")
    disk.clear()
    put_in_place(folder, tmp_path / "z.ckpt")
    inside = [("sync", "inner", None), ("sync", "0.distcp", 5), ("sync", "z.ckpt.partial", None)]
    assert disk == [*inside, ("rename", "z.ckpt.partial", "z.ckpt"), ("sync", tmp_path.name, None)]


def test_going_back_keeps_what_is_written_anew(tmp_path: Path, tiny_lm: Path) -> None:
    """Steps 1 to 3 are there, and the run goes on from 1 again: its new step 2 is the newest, not the oldest."""
    fit(tmp_path, tiny_lm, updates=3)
    first = tmp_path / "saved" / "step-000001.ckpt"
    fit(tmp_path, tiny_lm, updates=2, ckpt_path=first, keep=2)
    assert find_last(tmp_path, str(first.parent)).name == "step-000002.ckpt"
    assert sorted(path.name for path in first.parent.iterdir()) == ["step-000002.ckpt", "step-000003.ckpt"]
    left_behind = first.with_name("step-000009.ckpt.partial")
    left_behind.touch()
    fit(tmp_path, tiny_lm, updates=2, keep=1)  # from the start: steps 1 and 2 once more
    assert [path.name for path in first.parent.iterdir()] == ["step-000002.ckpt"]


def test_a_second_run_with_the_same_callback_is_saved_too(tmp_path: Path, tiny_lm: Path) -> None:
    """A notebook's cell run again: it ends at the step that the first one saved last."""
    saving = StepCheckpoint(dirpath=str(tmp_path / "saved"))
    for seed in (3, 4):
        module = make_module(tiny_lm, seed=seed)
        trainer = make_trainer(tmp_path, callbacks=[saving], max_steps=1, enable_checkpointing=True)
        trainer.fit(module, make_data(tmp_path))
    state = torch.load(tmp_path / "saved" / "step-000001.ckpt", weights_only=True)["state_dict"]
    assert all(value.equal(module.state_dict()[name]) for name, value in state.items())


def test_another_way_of_writing_checkpoints_is_left_alone() -> None:
    class Own(TorchCheckpointIO):
        """As given to ``Trainer(plugins=...)``."""

    for given, used in ((TorchCheckpointIO(), WholeFiles), (Own(), Own)):
        trainer: Any = SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=given))
        use_whole_files(trainer)
        assert type(trainer.strategy.checkpoint_io) is used


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("import pathlib; pathlib.Path('sprung').touch()",)


def foreign(path: Path) -> None:
    torch.save({"model": torch.zeros(3)}, path)


def trapped(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "trap": Trap()}, path)


UNREADABLE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-2000]), "cannot be read, it is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read, it is damaged"),
    "no checkpoint": (lambda path: path.write_text("hello"), "cannot be read, it is damaged"),
    "a plain pickle": (
        lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
        "cannot be read, it is damaged",
    ),
    "foreign": (foreign, "is none of a training run, it lacks state_dict and pytorch-lightning_version"),
    "code": (trapped, "holds more than plain data, and reading it would run code"),
}


@pytest.mark.parametrize(("harm", "words"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_an_unreadable_checkpoint_is_named(
    tmp_path: Path, tiny_lm: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, harm: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    harm(saved)
    for read in (read_summary, WholeFiles().load_checkpoint, lambda path: fit(tmp_path, tiny_lm, 2, ckpt_path=path)):
        with pytest.raises(CheckpointError, match=f"step-000001.ckpt: {words}"):
            read(saved)
    assert not Path("sprung").exists()


def test_the_command_names_a_truncated_checkpoint(tmp_path: Path, tiny_lm: Path) -> None:
    command = ppo(tmp_path, tiny_lm)
    run_command(*command, cwd=tmp_path).ok()
    (path,) = tmp_path.rglob("*.ckpt")
    path.write_bytes(path.read_bytes()[:1000])
    run_command(*command, "--ckpt_path=last", cwd=tmp_path).refused("step-000001.ckpt: cannot be read", "delete it")


def with_code(folder: Path, kind: str) -> Path:
    """Lets the model's config, and its tokenizer's, point at a class in the folder itself."""
    (folder / "own.py").write_text(
        "from pathlib import Path\nimport transformers\nPath(__file__).parent, Path('sprung').touch()\n"
        f"class OwnConfig(transformers.GPT2Config):\n    model_type = 'own'\n"
        f"class OwnModel(transformers.{kind}):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoModel": "own.OwnModel"}
    auto["AutoModelForSequenceClassification"] = "own.OwnModel"
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    return folder


def test_code_of_a_model_runs_only_where_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    actor = str(with_code(make_causal_lm(tmp_path / "lm"), "GPT2LMHeadModel"))
    reward = str(with_code(make_reward_model(tmp_path / "reward"), "GPT2ForSequenceClassification"))
    loads = {
        "actor": lambda: load_causal_lm("actor", actor, {}),
        "critic": lambda: load_critic("critic", actor, {}),
        "reward": lambda: RewardModel(reward).build(),
    }
    for load in loads.values():
        with pytest.raises(ValueError, match="trust_remote_code"):
            load()
    load_tokenizer("actor", actor)  # an ordinary one beside such a model
    assert not Path("sprung").exists()
    assert type(load_causal_lm("actor", actor, {"trust_remote_code": True})).__name__ == "OwnModel"
    assert Path("sprung").exists()
