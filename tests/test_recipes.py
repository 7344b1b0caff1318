"""Published recipes: what sets each apart from ``ppo.yaml``, and that it runs."""

import inspect
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lit_ppo
from tests.helpers.command import REPOSITORY, run_command
from tests.helpers.ppo_command import RECIPES, ppo_arguments
from tests.helpers.tiny import WORDS

CONFIGS = REPOSITORY / "configs"
GONE = object()


def flat(config: Any, name: str = "") -> dict[str, Any]:
    """Settings by their dotted name. A class is the setting of its place; its arguments follow below that."""
    if isinstance(config, list) and all(isinstance(entry, dict) for entry in config):
        return {key: value for i, entry in enumerate(config) for key, value in flat(entry, f"{name}.{i}").items()}
    if not isinstance(config, dict):
        return {name: config}
    settings = {name: config["class_path"].rpartition(".")[2]} if "class_path" in config else {}
    for key, value in {**config, **config.get("init_args", {})}.items():
        if key not in ("class_path", "init_args"):
            settings |= flat(value, f"{name}.{key}".lstrip("."))
    return settings


@pytest.fixture(scope="module")
def effective(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Settings of a run with a recipe alone, started in another folder."""

    @cache
    def settings(name: str) -> dict[str, Any]:
        command = ["fit", "--config", recipe(name), "--print_config"]
        return flat(yaml.safe_load(run_command(*command, cwd=tmp_path_factory.mktemp(name)).ok().out))

    return settings


def recipe(name: str) -> Path:
    return CONFIGS / f"{name}.yaml"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_differs_from_ppo_in_what_it_says(name: str, effective: Any):
    said = yaml.safe_load(recipe(name).read_text())
    assert said.pop("base") == "ppo.yaml"
    if more := said["trainer"].pop("callbacks+", None):
        callbacks = yaml.safe_load(recipe("ppo").read_text())["trainer"]["callbacks"]
        said["trainer"]["callbacks"] = [*({} for _ in callbacks), *more]
    said, ppo, found = flat(said), effective("ppo"), effective(name)
    changed = {key for key, value in found.items() if ppo.get(key, GONE) != value}
    assert {key: found.get(key) for key in said} == said
    assert {key for key in said if "callbacks" not in key} <= changed, "it repeats ppo.yaml"
    # what it does not say differs only below a class that it names, whose other arguments have their defaults
    assert [key for key in changed - said.keys() if not any(key.startswith(f"{place}.") for place in said)] == []


def test_an_update_of_a_recipe_is_as_many_steps_as_its_source_says(effective: Any):
    """Rows of an update over the size of a minibatch, times passes."""
    steps = {
        "ppo_max": 2, "instructgpt": 8, "openai_2019": 4, "llama2": 8, "grpo": 1, "rloo": 1, "reinforce_pp": 2
    }  # fmt: skip
    assert sorted(steps) == sorted(RECIPES)
    for name, number in steps.items():
        found = effective(name)
        rows = found["data.batch_size"] * found["model.samples_per_prompt"]
        assert rows / found["model.minibatch_size"] * found["model.ppo_epochs"] == number, name


def test_learning_rates_follow_that_of_sft(effective: Any):
    """The actor learns at a tenth of SFT's rate, the critic at about twice SFT's: 18 times the actor's."""
    sft, ppo, lora = effective("sft"), effective("ppo"), flat(yaml.safe_load(recipe("lora").read_text()))
    assert ppo["model.actor_optimizer.lr"] == pytest.approx(sft["model.optimizer.lr"] / 10)
    assert ppo["model.critic_optimizer.lr"] == pytest.approx(18 * ppo["model.actor_optimizer.lr"])
    assert (lit_ppo_default("LitSFT", "optimizer"), sft["model.optimizer.lr"]) == (5e-6, 5e-6)
    for part in ("actor", "critic"):
        assert lit_ppo_default("LitPPO", f"{part}_optimizer") == ppo[f"model.{part}_optimizer.lr"]
        assert lora[f"model.{part}_optimizer.lr"] == pytest.approx(10 * ppo[f"model.{part}_optimizer.lr"])


def lit_ppo_default(cls: str, argument: str) -> float:
    """Learning rate of a constructor's default optimizer."""
    optimizer = (
        inspect.signature(getattr(lit_ppo, cls)).parameters[argument].default([torch.nn.Parameter(torch.ones(1))])
    )
    rate: float = optimizer.defaults["lr"]
    return rate


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_on_small_models(name: str, tmp_path: Path, tiny_lm: Path, tiny_reward: Path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"the {w} was good"}) + "\n" for w in WORDS))
    arguments = ppo_arguments(tmp_path, tiny_lm, tiny_reward)
    arguments = [argument.replace("ppo.yaml", f"{name}.yaml") for argument in arguments]
    arguments += ["--model.samples_per_prompt=2"] if name in ("grpo", "rloo") else []
    run_command("fit", *arguments, "--trainer.max_steps=1", "--report.prompts=0", cwd=tmp_path).ok()
    events = EventAccumulator(str(tmp_path / f"runs/{name}/version_0")).Reload()
    assert [event.step for event in events.Scalars("objective/score")] == [0]
    assert ("value/loss" in events.Tags()["scalars"]) == (name not in ("grpo", "rloo", "reinforce_pp"))
    assert (tmp_path / f"runs/{name}/version_0/model/config.json").exists()


def test_an_estimator_is_switched_on_from_the_command_line(tmp_path: Path, tiny_lm: Path, tiny_reward: Path):
    """On top of ppo.yaml, whose GAE has arguments of its own and whose ValueClipping needs a critic."""
    arguments = [*ppo_arguments(tmp_path, tiny_lm, tiny_reward), "--model.advantages=Reinforce"]
    run_command("fit", *arguments, cwd=tmp_path).refused("LitPPO(critic='actor')", "Reinforce", "set critic to null")
    arguments += ["--model.critic=null", "--trainer.callbacks=null", "--trainer.max_steps=1"]
    run_command("fit", *arguments, cwd=tmp_path).ok()


@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_a_recipe_runs_on_forty_prompts(name: str, tmp_path: Path, tiny_lm: Path, tiny_reward: Path):
    """Sizes of batch, minibatch, validation and checkpoints as shipped; only paths and lengths change.

    RLOO's minibatch of 256 is larger than all responses.
    """
    rows = [{"prompt": f"{first} {second}"} for first in WORDS[:8] for second in WORDS[:5]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"--model.actor={tiny_lm}", f"--model.rewards.model={tiny_reward}", "--data.path=prompts.jsonl"]
    lengths = ["--model.generation.max_new_tokens=2", "--data.max_prompt_length=8", "--trainer.accelerator=cpu"]
    run_command("fit", "--config", recipe(name), *arguments, *lengths, cwd=tmp_path).ok()
    assert list((tmp_path / f"runs/{name}").rglob("model.safetensors"))
