"""Every overlay of ``configs/strategy`` through the command, on two processes started as torchrun starts them."""

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.helpers.command import REPOSITORY, Running, run_command
from tests.helpers.ppo_command import ppo_arguments
from tests.helpers.ranks import open_store, rank_environment

STRATEGIES = {
    "ddp": [],
    "fsdp2": ["--trainer.strategy.mixed_precision=bfloat16", "--trainer.strategy.offload_frozen=true"],
    "fsdp2_multinode": [],
}


def test_every_overlay_is_run():
    found = {path.stem: path.read_text() for path in (REPOSITORY / "configs/strategy").iterdir()}
    assert yaml.safe_load(found.pop("fsdp")) == {"base": "fsdp2.yaml"}
    assert found.keys() == STRATEGIES.keys()


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_overlay_trains_and_exports(name, tmp_path, tiny_lm, tiny_reward):
    arguments = ppo_arguments(tmp_path, tiny_lm, tiny_reward)
    arguments += ["--config", str(REPOSITORY / f"configs/strategy/{name}.yaml"), *STRATEGIES[name]]
    arguments += [f"--trainer.default_root_dir={tmp_path}/runs", f"--data.path={tmp_path}/prompts.jsonl"]
    for i in range(2):
        (tmp_path / str(i)).mkdir()
    nodes = 2 if name.endswith("multinode") else 1
    arguments += ["--trainer.max_steps=1", f"--trainer.devices={2 // nodes}"]
    store = open_store()
    environments = [rank_environment(store, i, n=2, nodes=nodes) for i in range(2)]
    running = [Running("fit", *arguments, cwd=tmp_path / str(i), env=env) for i, env in enumerate(environments)]
    for process in running:
        process.result().ok()
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs/version_0/model")
    saved = [path.name for path in (tmp_path / "runs/version_0/checkpoints").glob("*")]
    assert saved == ["step-000001.ckpt"]


def test_the_command_takes_fsdp_for_fsdp2(tmp_path, tiny_lm, tiny_reward):
    arguments = [*ppo_arguments(tmp_path, tiny_lm, tiny_reward), "--trainer.max_steps=1", "--trainer.devices=1"]
    run_command("fit", *arguments, "--trainer.strategy=fsdp", cwd=tmp_path).ok()
    assert yaml.safe_load((tmp_path / "runs/ppo/version_0/config.yaml").read_text())["trainer"]["strategy"] == "fsdp2"
