"""Names of classes in saved configurations, and what the command completes after parsing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_ppo.cli.command import Command
from lit_ppo.cli.session import Session
from tests.helpers.command import REPOSITORY

CONFIGS = REPOSITORY / "configs"
LONG_NAMES = """
model:
  class_path: lit_ppo.ppo.module.LitPPO
  init_args:
    actor_scheduler: {class_path: lit_ppo.optim.schedules.WarmupCosine}
    rewards:
      liked: {source: {class_path: lit_ppo.rewards.model.RewardModel, init_args: {model: x}}, weight: 1.0}
      short: {source: {class_path: RewardFunction, init_args: {function: my.function}}, weight: 1.0}
data: {class_path: lit_ppo.quickstart.data.ReviewText, init_args: {path: x}}
trainer:
  callbacks:
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


def layers() -> Iterator[list[Path]]:
    """Every shipped file on top of what it needs; the tricks and monitors all at once."""
    base = CONFIGS / "ppo.yaml"
    yield [base, *CONFIGS.glob("tricks/*.yaml"), *CONFIGS.glob("monitors/*.yaml")]
    for path in [p for p in CONFIGS.rglob("*.yaml") if p.parent.name not in ("tricks", "monitors")]:
        model = (yaml.safe_load(path.read_text()).get("model") or {}).get("class_path", "LitPPO")
        yield [base, path] if model == "LitPPO" else [path]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning calls jsonargparse in an old way
def test_saved_configurations_name_no_module(tmp_path: Path) -> None:
    """Modules may then move without breaking a checkpoint."""
    (tmp_path / "long.yaml").write_text(LONG_NAMES)
    seen = set()
    for files in [*layers(), [CONFIGS / "ppo.yaml", tmp_path / "long.yaml"]]:
        for path in class_paths(effective(*files)):
            package, _, name = path.rpartition(".")
            if path.startswith("lit_ppo."):
                assert package in ("lit_ppo", "lit_ppo.callbacks", "lit_ppo.quickstart"), (path, files)
                seen.add(name)
    assert seen > {"LitPPO", "WarmupCosine", "RewardModel", "RewardFunction", "ReviewText", "PTXLoss", "TextDataModule"}
