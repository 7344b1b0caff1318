"""Configuration files with a ``base``."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.command import REPOSITORY, run_command

PPO = REPOSITORY / "configs/ppo.yaml"
MIDDLE = f"""
base: {PPO}
model:
  init_args:
    advantages:
      class_path: GroupRelative
      init_args: {{scale: false}}
    kl_coef: 0.5
trainer:
  callbacks+:
    - class_path: RewardClipping
"""
TOP = """
base: ../middle.yaml
model:
  init_args: {kl_coef: 0.25, clip_range: 0.1}
"""


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A file on top of another one, in the folder above, on top of ``ppo.yaml``."""
    (tmp_path / "top").mkdir()
    (tmp_path / "middle.yaml").write_text(MIDDLE)
    (tmp_path / "top/top.yaml").write_text(TOP)
    return tmp_path / "top/top.yaml"


def printed(*arguments: Any, cwd: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(run_command("fit", *arguments, "--print_config", cwd=cwd).ok().out))


def test_each_file_overrides_what_it_is_based_on(top: Path, tmp_path: Path) -> None:
    """From another folder; another class in a higher file drops the arguments of the lower one's."""
    config = printed("--config", top, "--model.clip_range=0.3", cwd=tmp_path / "elsewhere")
    model = config["model"]["init_args"]
    assert (model["kl_coef"], model["clip_range"], model["minibatch_size"]) == (0.25, 0.3, 32)
    assert model["advantages"]["init_args"] == {"scale": False}
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names == ["AdvantageNormalization", "ValueClipping", "RewardClipping"]
    assert "base" not in config


@pytest.mark.parametrize("file", ["top/top.yaml", "middle.yaml"])
def test_an_error_names_the_file_of_the_chain_and_the_line(top: Path, tmp_path: Path, file: str) -> None:
    text = (tmp_path / file).read_text().replace("kl_coef", "kl_coeff")
    (tmp_path / file).write_text(text)
    (number,) = (i for i, line in enumerate(text.splitlines(), 1) if "kl_coeff" in line)
    run_command("fit", "--config", top, cwd=tmp_path).refused(f"{tmp_path / file}:{number}: ", "'kl_coef'")


def test_a_base_that_is_missing_or_based_on_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed_everything: 1\nbase: b.yaml\n")
    arguments = ("fit", "--config", "a.yaml", "--print_config")
    run_command(*arguments, cwd=tmp_path).refused("a.yaml:2: base: file b.yaml does not exist", "relative to")
    (tmp_path / "b.yaml").write_text("base: ./a.yaml\n")
    run_command(*arguments, cwd=tmp_path).refused("b.yaml:1: base: a.yaml is based on this file")
