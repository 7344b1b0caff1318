"""Published recipes: what sets each apart from ``ppo.yaml``, and that it runs."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lit_ppo.callbacks
from tests.command import REPOSITORY, run_command
from tests.test_cli_errors import ppo_arguments

CONFIGS = REPOSITORY / "configs"
GONE = object()
NO_CRITIC = {
    "model.critic": None,
    "model.critic_optimizer": GONE,
    "trainer.callbacks": GONE,
    "model.ppo_epochs": 1,
}
RECIPES: dict[str, dict[str, Any]] = {  # what differs from ppo.yaml
    "grpo": {
        **NO_CRITIC,
        "model.advantages": {"class_path": "GroupRelative", "init_args": {"scale": True}},
        "model.samples_per_prompt": 64,
        "model.kl_coef": 0.0,
        "model.minibatch_size": 1024,
        "model.loss_reduction": "sequence_mean",
        "data.batch_size": 16,
        "trainer.default_root_dir": "runs/grpo",
        "trainer.callbacks": [{"class_path": "KLLoss", "init_args": {"coef": 0.04, "kind": "k3"}}],
    },
    "rloo": {
        **NO_CRITIC,
        "model.advantages": "LeaveOneOut",
        "model.samples_per_prompt": 4,
        "model.kl_coef": 0.03,
        "model.clip_range": None,
        "model.minibatch_size": 256,
        "trainer.default_root_dir": "runs/rloo",
    },
    "reinforce_pp": {
        **NO_CRITIC,
        "model.advantages": "Reinforce",
        "model.kl_coef": 0.01,
        "model.minibatch_size": 128,
        "model.actor_optimizer": {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": 5e-7, "weight_decay": 0.0, "fused": True},
        },
        "data.batch_size": 256,
        "trainer.default_root_dir": "runs/reinforce_pp",
    },
}


def settings(name: str) -> dict[str, Any]:
    """What a file sets, by section and argument."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    flat = {section: config.pop(section) for section in ("model", "data", "trainer")}
    flat = {f"{section}.{key}": v for section, keys in flat.items() for key, v in keys.get("init_args", keys).items()}
    return {**flat, **config}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_differs_from_ppo_in_what_its_source_says(name: str):
    ppo, recipe = settings("ppo"), settings(name)
    keys = ppo.keys() | recipe.keys()
    differs = {key: recipe.get(key, GONE) for key in keys if recipe.get(key, GONE) != ppo.get(key, GONE)}
    assert differs == RECIPES[name]


@pytest.mark.parametrize("name", RECIPES)
def test_an_update_of_a_recipe_is_as_many_steps_as_its_source_says(name: str):
    """Rows of an update over the size of a minibatch: the published ones take 1, 1 and 2."""
    recipe = settings(name)
    rows = recipe["data.batch_size"] * recipe["model.samples_per_prompt"]
    assert rows / recipe["model.minibatch_size"] * recipe["model.ppo_epochs"] == {"reinforce_pp": 2}.get(name, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_on_small_models_and_goes_on(name: str, tmp_path: Path, tiny_lm: Path, tiny_reward: Path):
    if not hasattr(lit_ppo.callbacks, "KLLoss") and name == "grpo":
        pytest.skip("KLLoss is not there")
    arguments = ppo_arguments(tmp_path, tiny_lm, tiny_reward)
    arguments = [argument.replace("ppo.yaml", f"{name}.yaml") for argument in arguments]
    arguments += [] if name == "reinforce_pp" else ["--model.samples_per_prompt=2"]
    run_command("fit", *arguments, "--trainer.max_steps=1", cwd=tmp_path).ok()
    out = run_command("fit", *arguments, "--ckpt_path=last", cwd=tmp_path).ok().out
    assert "before and after" in out
    assert "val/score" in run_command("validate", *arguments, "--ckpt_path=last", cwd=tmp_path).ok().out
    events = EventAccumulator(str(tmp_path / f"runs/{name}/version_0")).Reload()
    tags = events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("policy/loss")] == [0, 1]
    assert not [tag for tag in tags if tag.startswith("value/")]
    assert (tmp_path / f"runs/{name}/version_0/model/config.json").exists()


@pytest.mark.parametrize("estimator", ["LeaveOneOut", "GroupRelative", "Reinforce"])
def test_an_estimator_is_switched_on_from_the_command_line(
    estimator: str, tmp_path: Path, tiny_lm: Path, tiny_reward: Path
):
    """Over ppo.yaml, whose GAE has arguments of its own and whose ValueClipping needs a critic."""
    arguments = [*ppo_arguments(tmp_path, tiny_lm, tiny_reward), f"--model.advantages={estimator}"]
    arguments += ["--model.samples_per_prompt=2", "--trainer.max_steps=1"]
    run_command("fit", *arguments, cwd=tmp_path).refused("LitPPO(critic='actor')", estimator, "set critic to null")
    arguments.append("--model.critic=null")
    if estimator == "GroupRelative":
        run_command("fit", *arguments, cwd=tmp_path).refused("LitPPO(kl_coef=0.05)", estimator, "KLLoss")
        arguments.append("--model.kl_coef=0")
    run_command("fit", *arguments, cwd=tmp_path).refused("ValueClipping needs a critic")
    run_command("fit", *arguments, "--trainer.callbacks=null", cwd=tmp_path).ok()
