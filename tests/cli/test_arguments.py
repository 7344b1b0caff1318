"""Names of classes in saved configurations, and what the command completes after parsing."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_ppo.cli.command import Command
from lit_ppo.cli.session import Session
from tests.helpers.command import REPOSITORY, run_command

CONFIGS = REPOSITORY / "configs"
LONG_NAMES = """
model:
  class_path: lit_ppo.ppo.module.LitPPO
  init_args:
    actor_scheduler: {class_path: lit_ppo.optim.schedules.WarmupCosine}
    advantages: {class_path: lit_ppo.advantages.GroupRelative}
    rewards:
      liked: {source: {class_path: lit_ppo.rewards.model.RewardModel, init_args: {model: x}}, weight: 1.0}
      short: {source: {class_path: RewardFunction, init_args: {function: my.function}}, weight: 1.0}
data: {class_path: lit_ppo.quickstart.data.ReviewText, init_args: {path: x}}
trainer:
  strategy: {class_path: lit_ppo.parallel.strategies.FSDP2Strategy}
  callbacks+:
  - class_path: PTXLoss
    init_args: {coef: 1.0, data: {class_path: lit_ppo.data.text.TextDataModule, init_args: {path: x}}}
"""


class Parsed(Exception):
    """Raised with the configuration instead of a run."""


class ParsesOnly(Command):
    def before_instantiate_classes(self) -> None:
        raise Parsed(self._effective(self._config))


def effective(*files: Path) -> dict[str, Any]:
    """The configuration that checkpoints hold."""
    arguments = [word for file in files for word in ("--config", str(file))]
    try:
        ParsesOnly(Session(["fit", *arguments, "--seed_everything=false"], debug=False))
    except Parsed as parsed:
        return parsed.args[0]
    raise AssertionError


def class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        for item in value.values():
            yield from class_paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from class_paths(item)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning calls jsonargparse in an old way
def test_saved_configurations_name_no_module(tmp_path: Path) -> None:
    """Modules may then move without breaking a checkpoint."""
    (tmp_path / "long.yaml").write_text(LONG_NAMES)
    tricks = [*CONFIGS.glob("tricks/*.yaml"), *CONFIGS.glob("monitors/*.yaml")]
    jobs = [[CONFIGS / "ppo.yaml", *tricks, tmp_path / "long.yaml"], [CONFIGS / "sft.yaml"], [CONFIGS / "reward.yaml"]]
    paths = {path for files in jobs for path in class_paths(effective(*files)) if path.startswith("lit_ppo.")}
    assert {path.rpartition(".")[0] for path in paths} == {"lit_ppo", "lit_ppo.callbacks", "lit_ppo.quickstart"}
    names = {path.rpartition(".")[2] for path in paths}
    assert names > {"LitPPO", "LitSFT", "LitRewardModel", "WarmupCosine", "GroupRelative", "RewardModel", "ReviewText"}
    assert names > {"RewardFunction", "FSDP2Strategy", "PTXLoss", "TextDataModule", "PreferenceDataModule"}


@pytest.mark.parametrize("layers", [[], ["--config", str(CONFIGS / "sft.yaml")]])
@pytest.mark.parametrize("given", ["yaml", "options"])
def test_another_class_starts_with_its_own_defaults(tmp_path: Path, layers: list[str], given: str) -> None:
    """Not with arguments of the class that it replaces: AdamW's weight decay, in SGD, is another loss."""
    name = "model.init_args.optimizer"
    overlay: dict[str, Any] = {
        "model": {"class_path": "LitSFT", "init_args": {"model": "x"}},
        "data": {"class_path": "TextDataModule", "init_args": {"path": "a"}},
    }
    if given == "yaml":
        overlay["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3}}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    options = [f"--{name}=torch.optim.SGD", f"--{name}.lr=0.3"] if given == "options" else []
    last = ["--config", str(tmp_path / "overlay.yaml"), *options, "--print_config"]
    shown = yaml.safe_load(run_command("fit", *layers, *last, cwd=tmp_path).ok().out)
    found = shown["model"]["init_args"]["optimizer"]["init_args"]
    expected = inspect.signature(torch.optim.SGD).parameters
    assert found == {name: 0.3 if name == "lr" else expected[name].default for name in found}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_of_several_rewards_keeps_arguments_that_are_mappings(tmp_path: Path) -> None:
    given = {"class_path": "lit_ppo.RewardModel", "init_args": {"model": "x", "model_kwargs": {"dtype": "bfloat16"}}}
    overlay = {"model": {"init_args": {"rewards": {"liked": {"source": given, "weight": 0.5}}}}}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    rewards = effective(CONFIGS / "ppo.yaml", tmp_path / "overlay.yaml")["model"]["init_args"]["rewards"]
    assert given["init_args"].items() <= rewards["liked"]["source"]["init_args"].items()
