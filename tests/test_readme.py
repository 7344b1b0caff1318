"""What the README says is what happens."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import lit_ppo.callbacks
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
        assert (REPOSITORY / name).exists(), name
    for name in re.findall(r"--config ([\w/]+)[ `]", README):
        assert (REPOSITORY / "configs" / f"{name}.yaml").is_file(), name


@pytest.mark.filterwarnings("ignore:.*smaller than minibatch_size")
def test_the_code(tmp_path: Path, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps, tricks = blocks("python")
    names: dict[str, Any] = {"loader": [["the film", "a plot"]] * 2, "my_scores": lambda prompts, responses: [0.0, 1.0]}
    exec(steps.replace("runs/quickstart/sft/model", str(tiny_lm)), names)
    names["ppo"].loop.close()
    assert names["metrics"]["objective/score"] == 0.5
    names = {"L": L, **vars(lit_ppo.callbacks)}
    exec(tricks, names)
    assert {type(callback).__name__ for callback in names["trainer"].callbacks} >= {
        "AdaptiveKL",
        "AdvantageNormalization",
    }
