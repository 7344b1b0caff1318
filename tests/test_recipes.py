"""Published recipes: what sets each apart from ``ppo.yaml``, and that it runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.command import REPOSITORY, run_command
from tests.helpers.ppo_command import ppo_arguments
from tests.helpers.tiny import WORDS

CONFIGS = REPOSITORY / "configs"
GONE = object()
NO_CRITIC = {
    "model.critic": None,
    "model.critic_optimizer": GONE,
    "trainer.callbacks": GONE,
    "model.ppo_epochs": 1,
}
FROM_REWARD = {"class_path": "RewardModel", "init_args": {"model": "runs/reward/version_0/model", "batch_size": 16}}


def adamw(lr: float, **others: Any) -> dict[str, Any]:
    return {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "weight_decay": 0.0, "fused": True, **others}}


def trick(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, **({"init_args": arguments} if arguments else {})}


def ptx(coef: float, batch_size: int) -> dict[str, Any]:
    texts = {"path": "texts.jsonl", "batch_size": batch_size, "max_length": 512}
    return trick("PTXLoss", coef=coef, data={"class_path": "TextDataModule", "init_args": texts})


LLAMA2_ADAMW = adamw(1e-6, betas=[0.9, 0.95], eps=1e-5, weight_decay=0.1)
RECIPES: dict[str, dict[str, Any]] = {  # what differs from ppo.yaml
    "ppo_max": {
        "model.critic": "reward",
        "model.rewards": FROM_REWARD,
        "model.ppo_epochs": 1,
        "model.actor_optimizer": adamw(5e-7),
        "model.critic_optimizer": adamw(1.65e-6),
        "trainer.default_root_dir": "runs/ppo_max",
        "trainer.callbacks": [
            trick("RewardNormalization", statistics="running", clip=5.0),
            trick("CriticWarmup", updates=10),
            trick("ValueClipping"),
            ptx(1.0, 8),
        ],
    },
    "instructgpt": {
        "model.critic": "reward",
        "model.rewards": FROM_REWARD,
        "model.kl_coef": 0.02,
        "model.ppo_epochs": 1,
        "model.minibatch_size": 64,
        "model.actor_optimizer": adamw(9e-6),
        "model.critic_optimizer": adamw(9e-6),
        "data.batch_size": 512,
        "trainer.default_root_dir": "runs/instructgpt",
        "trainer.callbacks": [trick("AdvantageNormalization"), trick("ValueClipping"), ptx(27.8, 64)],
    },
    "openai_2019": {
        "model.generation": {"max_new_tokens": 24},
        "model.temperature": 0.7,
        "model.kl_coef": 0.15,
        "model.ppo_epochs": 4,
        "model.minibatch_size": 512,
        "data.batch_size": 512,
        "trainer.default_root_dir": "runs/openai_2019",
        "trainer.callbacks": [
            trick("RewardWhitening", unbiased=False),
            trick("AdvantageNormalization"),
            trick("ValueClipping", clip_range=0.2),
            trick("AdaptiveKL", target=6.0, horizon=10000),
        ],
    },
    "llama2": {
        "model.kl_coef": 0.01,
        "model.ppo_epochs": 1,
        "model.minibatch_size": 64,
        "model.actor_optimizer": LLAMA2_ADAMW,
        "model.critic_optimizer": LLAMA2_ADAMW,
        "data.batch_size": 512,
        "trainer.default_root_dir": "runs/llama2",
        "trainer.callbacks": [
            trick("RejectionSampling", k=10, every=2),
            trick("RewardNormalization", statistics="batch"),
            trick("AdvantageNormalization"),
            trick("ValueClipping"),
        ],
    },
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
    """Rows of an update over the size of a minibatch, times passes."""
    steps = {
        "ppo_max": 2, "instructgpt": 8, "openai_2019": 4, "llama2": 8, "grpo": 1, "rloo": 1, "reinforce_pp": 2
    }  # fmt: skip
    recipe = settings(name)
    rows = recipe["data.batch_size"] * recipe["model.samples_per_prompt"]
    assert rows / recipe["model.minibatch_size"] * recipe["model.ppo_epochs"] == steps[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_on_small_models_and_goes_on(name: str, tmp_path: Path, tiny_lm: Path, tiny_reward: Path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"the {w} was good"}) + "\n" for w in WORDS))
    arguments = ppo_arguments(tmp_path, tiny_lm, tiny_reward)
    arguments = [argument.replace("ppo.yaml", f"{name}.yaml") for argument in arguments]
    arguments += ["--model.samples_per_prompt=2"] if name in ("grpo", "rloo") else []
    run_command("fit", *arguments, "--trainer.max_steps=1", cwd=tmp_path).ok()
    out = run_command("fit", *arguments, "--ckpt_path=last", cwd=tmp_path).ok().out
    assert "before and after" in out
    assert "val/score" in run_command("validate", *arguments, "--ckpt_path=last", cwd=tmp_path).ok().out
    events = EventAccumulator(str(tmp_path / f"runs/{name}/version_0")).Reload()
    tags = events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("objective/score")] == [0, 1]
    assert ("value/loss" in tags) == (settings(name)["model.critic"] is not None)
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
