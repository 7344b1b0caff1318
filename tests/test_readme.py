"""What the README says is what happens."""

import re
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.helpers.command import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_it_is_one_screen() -> None:
    assert README.count("\n") < 120


def test_the_first_two_blocks_are_commands_of_one_line() -> None:
    first, second = blocks("bash")[:2]
    assert first.count("\n") == second.count("\n") == 1
    assert first.strip().endswith("lit-ppo fit --config configs/quickstart.yaml")
    assert re.search(r"pytest -n 2$", second.strip())  # nothing is left out
    for block in (first, second):
        assert "-m venv .venv" in block
        assert "-c constraints.txt" in block
        assert "index" not in block


def test_files_that_are_named_exist() -> None:
    for name in {*re.findall(r"\]\((?!https:)([^)]+)\)", README), *re.findall(r"configs/[\w/]+\.yaml", README)}:
        assert (REPOSITORY / name.partition("#")[0]).exists(), name
    for name in re.findall(r"--config ([\w/]+)[ `]", README):
        assert (REPOSITORY / "configs" / f"{name}.yaml").is_file(), name


@pytest.mark.filterwarnings("ignore:.*smaller than minibatch_size", "ignore:.*smaller than the logging interval")
def test_the_code(tmp_path: Path, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    """As one script, below the two names that a reader has."""
    steps, tricks = (block.replace("runs/quickstart/sft/model", str(tiny_lm)) for block in blocks("python"))
    loader = DataLoader(["the film", "a plot"] * 32, batch_size=32)  # type: ignore[arg-type]
    names: dict[str, Any] = {
        "loader": loader,
        "my_scores": lambda prompts, responses: [float("film" in prompt) for prompt in prompts],
    }
    exec(steps, names)
    names["ppo"].loop.close()
    assert names["metrics"]["objective/score"] == 0.5
    exec(tricks.replace("max_steps=100", "max_steps=2, enable_progress_bar=False"), names)
    assert names["trainer"].global_step == 2
    assert names["trainer"].callback_metrics["objective/score"] == 0.5
