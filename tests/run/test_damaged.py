"""Damaged checkpoints: which one a run resumes from instead; and checkpoints whose entries were changed."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_ppo.callbacks import AdaptiveKL, RewardNormalization
from lit_ppo.parallel.checkpoint_io import AtomicCheckpointIO, CheckpointError, read_summary
from lit_ppo.run.checkpoint import StepCheckpoint
from lit_ppo.run.continuation import Continuation, find_own_checkpoints, run_folder
from lit_ppo.run.errors import CommandError
from lit_ppo.run.export import ExportModel
from tests.helpers.cli_toys import CONFIG
from tests.helpers.command import run_command
from tests.helpers.toys import make_data, make_module, make_trainer


def damage(path: Path) -> None:
    """Flip a bit of a weight."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with three checkpoints."""
    folder = tmp_path / "version_0"
    for step in (1, 2, 3):
        state = {"state_dict": {"w": torch.zeros(9999)}, "pytorch-lightning_version": "2.6.0", "global_step": step}
        AtomicCheckpointIO().save_checkpoint(state, folder / f"checkpoints/step-{step:06d}.ckpt")
    return folder


def path_of(run: Path, step: int) -> Path:
    return run / f"checkpoints/step-{step:06d}.ckpt"


def test_auto_falls_back_and_last_names_both(run: Path) -> None:
    root = run.parent
    assert Continuation("last", root, None, keep_folder=True).path == str(path_of(run, 3))
    damage(path_of(run, 3))
    with pytest.raises(CommandError) as refused:
        Continuation("last", root, None, keep_folder=True)
    assert all(str(path_of(run, step)) in str(refused.value) for step in (2, 3))
    with pytest.raises(CommandError, match=r"step-000003.ckpt is damaged.*newest intact checkpoint is .*step-000002"):
        Continuation("last", root, None, keep_folder=False, run=run_folder([run / "config.yaml"]))
    for step in (2, 1):
        found = Continuation("auto", root, None, keep_folder=True)
        assert (found.path, found.folder) == (str(path_of(run, step)), run)
        assert [f"step-00000{n}.ckpt is damaged" in note for n, note in enumerate(reversed(found.notes), step + 1)]
        assert len(found.notes) == 3 - step
        damage(path_of(run, step))
    with pytest.raises(CommandError, match=r"--ckpt_path auto: .*no checkpoint is intact \(3 tried\)"):
        Continuation("auto", root, None, keep_folder=True)


def test_the_run_whose_configuration_is_given_has_its_own_checkpoints(tmp_path: Path) -> None:
    """In the run folder, or in one that several runs share; its latest is not the newest of all."""

    def save(path: Path, folder: str) -> Path:
        state = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "lit_ppo_run": {"folder": folder}}
        AtomicCheckpointIO().save_checkpoint(state, path)
        return path

    first, second = (tmp_path / f"version_{i}" for i in range(2))
    own = [save(run / "checkpoints/step-000001.ckpt", "..") for run in (first, second)]
    shared = [save(tmp_path / f"saved/step-00000{i}.ckpt", f"../version_{i}") for i in range(2)]
    assert run_folder([first / "config.yaml", tmp_path / "job.yaml", tmp_path / "config.yaml"]) == first
    assert run_folder([tmp_path / "job.yaml"]) is None
    for given in ("last", "auto"):
        found = Continuation(given, tmp_path, None, keep_folder=True, run=first)
        assert (found.path, found.folder) == (str(own[0]), first)
        found = Continuation(given, tmp_path, str(tmp_path / "saved"), keep_folder=True, run=first)
        assert (found.path, found.folder) == (str(shared[0]), first)
        assert Continuation(given, tmp_path, None, keep_folder=True).path == str(own[1])
    assert find_own_checkpoints(second, str(tmp_path / "saved")) == [shared[1]]
    own[0].unlink()
    with pytest.raises(CommandError, match=r"no complete checkpoint of the run \S+version_0; leave"):
        Continuation("last", tmp_path, None, keep_folder=True, run=first)
    again = Continuation("auto", tmp_path, None, keep_folder=True, run=first)
    assert (again.path, again.folder) == (None, first)  # so that the same command resumes it next time


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "empty; give a checkpoint's path"),
        (" ", "empty; give a checkpoint's path"),
        (".", r"a folder, not a checkpoint; give a checkpoint's path"),
        ("version_0", r"a folder, not a checkpoint; give version_0/checkpoints/step-000003.ckpt"),
        ("version_0/checkpoints", r"a folder, not a checkpoint; give version_0/checkpoints/step-000003.ckpt"),
        ("gone.ckpt", "no such file"),
    ],
)
def test_a_path_that_is_no_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch, given: str, words: str) -> None:
    monkeypatch.chdir(run.parent)
    with pytest.raises(CommandError, match=f"^--ckpt_path .*{words}"):
        Continuation(given, run.parent, None, keep_folder=True)


def test_the_command_falls_back_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    command = ["fit", "--config=toy.yaml", "--checkpoint.every_n_train_steps=2"]
    run_command(*command, cwd=tmp_path).ok()
    checkpoints = tmp_path / "runs/version_0/checkpoints"
    damage(checkpoints / "step-000008.ckpt")
    run_command(*command, "--ckpt_path=last", cwd=tmp_path).refused("step-000008.ckpt is damaged", "step-000006.ckpt")
    result = run_command(*command, "--ckpt_path=auto", cwd=tmp_path).ok()
    assert "step-000008.ckpt is damaged" in result.out
    assert "using runs/version_0/checkpoints/step-000006.ckpt, an earlier one" in result.out


# Entries


def fit(folder: Path, actor: Path, updates: int, start: Path | None = None) -> None:
    optimizers = {f"{name}_optimizer": lambda params: torch.optim.AdamW(params) for name in ("actor", "critic")}
    schedule = {"actor_scheduler": lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer)}
    saving = StepCheckpoint(dirpath=str(folder / "saved"))
    callbacks = [AdaptiveKL(), RewardNormalization(), saving, ExportModel(str(folder / "model"))]
    trainer = make_trainer(folder, max_steps=updates, callbacks=callbacks, enable_checkpointing=True)
    module = make_module(actor, **optimizers, **schedule)
    trainer.fit(module, make_data(folder), ckpt_path=None if start is None else str(start), weights_only=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Path) -> dict[str, Any]:
    """A checkpoint of one update."""
    folder = tmp_path_factory.mktemp("saved")
    fit(folder, tiny_lm, updates=1)
    checkpoint: dict[str, Any] = torch.load(folder / "saved/step-000001.ckpt", weights_only=True)
    return checkpoint


NEEDED = ["loops", "callbacks", "optimizer_states", "lr_schedulers", "lit_ppo"]
NESTED = [
    "state_dict.actor.model.transformer.wte.weight",
    "loops.fit_loop.epoch_progress",
    "lit_ppo.rollouts",
    "PromptDataModule.position",
    "PromptDataModule.weights",
]
KINDS = [*NEEDED, "state_dict", "pytorch-lightning_version", "lit_ppo_run", "lit_ppo_card"]
KINDS += ["callbacks.AdaptiveKL", "lit_ppo_run.logged", "lit_ppo_card.figures", "lit_ppo.optimizers"]
GONE = "gone"  # stands for no entry
CHANGED: list[tuple[str, Any]] = [
    *((name, GONE) for name in [*NEEDED, *NESTED]),
    *((name, "x") for name in [*NESTED[:2], *NESTED[3:], "PromptDataModule"]),
    *((name, []) for name in ("optimizer_states", "lr_schedulers")),
    *((name, {}) for name in ("loops", "PromptDataModule")),
]


def changed(checkpoint: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy with another entry."""
    copy: dict[str, Any] = {**checkpoint, "state_dict": dict(checkpoint["state_dict"])}
    first, _, second = name.partition(".")
    copy[first] = inside = deepcopy(copy[first]) if first != "state_dict" else copy[first]
    last = second or first
    inside = inside if second else copy
    while last not in inside and "." in last:
        key, _, last = last.partition(".")
        inside = inside[key]
    if value == GONE:
        del inside[last]
    else:
        inside[last] = value
    return copy


@pytest.mark.parametrize("value", [7, None, "x"])
@pytest.mark.parametrize("name", KINDS)
def test_an_entry_of_another_kind_is_named(tmp_path: Path, saved: Any, name: str, value: Any) -> None:
    torch.save(changed(saved, name, value), tmp_path / "changed.ckpt")
    with pytest.raises(CheckpointError, match=f"changed.ckpt: its entry '{name}' must be a"):
        read_summary(tmp_path / "changed.ckpt")


@pytest.mark.parametrize(("name", "value"), CHANGED, ids=[f"{name}-{value}" for name, value in CHANGED])
def test_a_resumed_run_needs_its_entries(tmp_path: Path, tiny_lm: Path, saved: Any, name: str, value: Any) -> None:
    """They are there and of their kind; nothing starts anew in silence."""
    words = name.removeprefix("PromptDataModule.").removeprefix("state_dict.")
    torch.save(changed(saved, name, value), tmp_path / "changed.ckpt")
    with pytest.raises((CheckpointError, ValueError), match=words):
        fit(tmp_path, tiny_lm, updates=2, start=tmp_path / "changed.ckpt")


@pytest.mark.parametrize("name", ["PromptDataModule", "callbacks.AdaptiveKL"])
def test_a_state_that_starts_anew_is_named(
    tmp_path: Path, tiny_lm: Path, saved: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(changed(saved, name, GONE), tmp_path / "changed.ckpt")
    words = f"no state of {name.rpartition('.')[2]}"
    fit(tmp_path, tiny_lm, updates=2, start=tmp_path / "changed.ckpt")
    assert words in caplog.text
