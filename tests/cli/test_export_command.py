"""``lit-ppo export``: byte for byte what the run itself exports."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from lit_ppo.cli.export_command import build
from tests.helpers.cli_toys import CONFIG
from tests.helpers.command import run_command
from tests.helpers.ppo_command import ppo
from tests.helpers.tiny import make_causal_lm


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder; nothing but the actor is left of the models that it was built from."""
    folder = tmp_path_factory.mktemp("export")
    actor = make_causal_lm(folder / "lm", scale=4.0)
    run_command(*ppo(folder, actor), "--model.actor_optimizer.lr=1e-2", cwd=folder).ok()
    return folder / "runs/ppo/version_0"


def test_the_model_of_a_checkpoint_is_that_of_the_run(tmp_path: Path, run: Path) -> None:
    (checkpoint,) = run.rglob("*.ckpt")
    result = run_command("export", "--ckpt_path", checkpoint, "--output", "out", cwd=tmp_path).ok()
    assert files(tmp_path / "out") == files(run / "model")
    assert files(run / "model")["model.safetensors"] != files(run.parents[2] / "lm")["model.safetensors"]  # it learnt
    assert "Model: out" in result.out


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_checkpoint_and_one_without_configuration(tmp_path: Path, run: Path) -> None:
    """As sharding strategies write it: weights in a folder, the rest in meta.pt; the configuration lies beside it."""
    (checkpoint,) = run.rglob("*.ckpt")
    whole = torch.load(checkpoint, weights_only=True)
    del whole["lit_ppo_run"]
    folder = tmp_path / "version_0/checkpoints/step-000001.ckpt"
    dcp.save({"state_dict": whole.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    torch.save(whole, folder / "meta.pt")
    command = ["export", "--ckpt_path", folder, "--output", "out"]
    run_command(*command, cwd=tmp_path).refused("no configuration of its model", "version_0/config.yaml")
    shutil.copy(run / "config.yaml", tmp_path / "version_0")
    run_command(*command, cwd=tmp_path).ok()
    assert files(tmp_path / "out") == files(run / "model")


def test_any_module_that_can_be_saved(tmp_path: Path) -> None:
    """Its class is code outside of lit-ppo, which the command line must name. A second export replaces the first."""
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    run_command("fit", "--config", "toy.yaml", cwd=tmp_path).ok()
    last = "runs/version_0/checkpoints/step-000008.ckpt"
    command = ["export", f"--ckpt_path={last}", "--output=deep/out"]
    run_command(*command, cwd=tmp_path).refused(last, "tests.helpers.cli_toys.Toy", "runs code", "add --trust_class")
    for _ in range(2):
        run_command(*command, "--trust_class", "tests.helpers.cli_toys.Toy", cwd=tmp_path).ok()
    assert files(tmp_path / "deep/out") == files(tmp_path / "runs/version_0/model")


def test_a_checkpoint_of_other_models_is_refused(tmp_path: Path, run: Path) -> None:
    """Else what it lacks would be exported as it was before training."""
    (checkpoint,) = run.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)
    del state["state_dict"]["actor.model.transformer.wte.weight"]
    torch.save(state, tmp_path / "other.ckpt")
    command = ["export", "--ckpt_path=other.ckpt", "--output=out"]
    run_command(*command, cwd=tmp_path).refused("Checkpoint does not match this LitPPO", "missing: actor.model")
    assert not (tmp_path / "out").exists()


def test_of_all_models_only_the_actor_need_be_there(tmp_path: Path) -> None:
    arguments = {
        "actor": str(make_causal_lm(tmp_path / "lm")),
        "critic": "gone",
        "reference": "gone",
        "rewards": {"class_path": "lit_ppo.RewardFunction", "init_args": {"function": "tests.helpers.toys.count_good"}},
        "generation": {"max_new_tokens": 6},
    }
    module = build({"model": {"class_path": "lit_ppo.LitPPO", "init_args": arguments}})
    module.configure_model()
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"actor"}


def test_what_is_missing_or_in_the_way_is_named(tmp_path: Path, run: Path) -> None:
    (checkpoint,) = run.rglob("*.ckpt")
    assert run_command("export", "--output=out", cwd=tmp_path).refused("export", "--ckpt_path").code == 2
    run_command("export", "--ckpt_path=nope", "--output=out", cwd=tmp_path).refused("--ckpt_path nope", "no such")
    for word in ("last", "auto"):
        result = run_command("export", f"--ckpt_path={word}", "--output=out", cwd=tmp_path)
        assert result.refused(f"--ckpt_path {word}: ", "give a checkpoint's path, such as runs/").code == 2
    for given in ("nope", tmp_path):
        assert "'last'" not in run_command("export", "--ckpt_path", given, "--output=out", cwd=tmp_path).refused().last
    (tmp_path / "out").mkdir()
    (tmp_path / "out/diary.txt").write_text("mine")
    result = run_command("export", "--ckpt_path", checkpoint, "--output=out", cwd=tmp_path)
    result.refused("--output out", "no export has written: diary.txt")
