"""What the README says is what happens."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

import lit_ppo.callbacks
from lit_ppo.advantages import AdvantageEstimator
from tests.helpers.command import REPOSITORY, run_command
from tests.helpers.ppo_command import RECIPES, ppo_arguments, write_prompts

README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def example(word: str) -> str:
    """The Python block with this word."""
    (found,) = (block for block in blocks("python") if word in block)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user, with prompts."""
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path, 32)
    return tmp_path


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
    for name in {*re.findall(r"\]\(([\w./]+)\)", README), *re.findall(r"configs/[\w/]+\.yaml", README)}:
        assert (REPOSITORY / name).exists(), name


def test_every_trick_has_a_row() -> None:
    """One, in the order of the alphabet; monitors have a table of their own."""
    tricks, monitors = README.split("\n## Monitors\n")
    rows = [re.findall(r"^\| \[`(\w+)`\]", table, re.MULTILINE) for table in (tricks, monitors)]
    assert rows == [sorted(table, key=str.lower) for table in rows]
    assert sorted([*rows[0], *rows[1]]) == sorted(
        set(lit_ppo.callbacks.__all__) - {"Experience", "PPOCallback", "fire"}
    )


def test_every_estimator_has_a_row() -> None:
    table = README[README.index("## Advantages") : README.index("## Your own data")]
    rows = re.findall(r"^\| `(\w+)` \| .*arxiv\.org/abs/[\d.]+\)", table, re.MULTILINE)
    ours = [
        estimator for estimator in AdvantageEstimator.__subclasses__() if estimator.__module__.startswith("lit_ppo")
    ]
    assert set(rows) == {estimator.__name__ for estimator in ours}
    assert set(re.findall(r"configs/\w+\.yaml", table)) == {f"configs/{name}.yaml" for name in ("ppo", *RECIPES)}


def test_the_lambda_example_in_a_script_and_with_its_fit_run_twice(folder: Path, tiny_lm: Path) -> None:
    code = example("lambda").replace("runs/sft/version_0/model", str(tiny_lm))
    assert code.count("\n") <= 20
    names: dict[str, Any] = {}
    exec(code, names)
    start = AutoModelForCausalLM.from_pretrained(tiny_lm)
    first = AutoModelForCausalLM.from_pretrained(folder / "runs/good/model")
    assert _distance(start, first) > 0
    cell = code[code.index("trainer = ") :]
    exec(cell, names)  # as a cell of a notebook: training continues
    assert names["model"].rollouts == 2  # one of each fit
    assert _distance(first, AutoModelForCausalLM.from_pretrained(folder / "runs/good/model")) > 0


def _distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    return sum(float((a - b).detach().abs().sum()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_loop_example(folder: Path, tiny_lm: Path) -> None:
    names: dict[str, Any] = {}
    exec(example("BestHalf"), names)
    seen: list[tuple[int, float]] = []

    class Watched(names["BestHalf"]):  # type: ignore[name-defined, misc]
        def update(self, experience: Any) -> None:
            seen.append((len(experience), float(experience.scores.min())))
            super().update(experience)

    code = example("lambda").replace("LitPPO(", "Watched(").replace("runs/sft/version_0/model", str(tiny_lm))
    exec(code.replace('response.count("good")', "len(response)"), {"Watched": Watched})
    assert [rows for rows, _ in seen] == [16]
    assert seen[0][1] > 0


@pytest.mark.filterwarnings("ignore:.*smaller than minibatch_size", "ignore:.*bf16", "ignore:.*log_every_n_steps")
def test_the_loop_in_the_users_hands(folder: Path, tiny_lm: Path) -> None:
    steps = example("for prompts in loader").replace("runs/quickstart/sft/model", str(tiny_lm))
    names: dict[str, Any] = {"loader": [["the film", "a plot"]] * 2, "my_scores": lambda prompts, responses: [0.0, 1.0]}
    exec(steps, names)
    names["ppo"].loop.close()
    assert names["metrics"]["objective/score"] == 0.5
    attached = example("ppo.attach").replace("max_steps=100", "max_steps=1")
    attached = attached.replace("...  # as above", steps[steps.index("experience =") :].replace("\n", "\n    "))
    imports = {"L": L, "AdaptiveKL": lit_ppo.callbacks.AdaptiveKL, "StepCheckpoint": lit_ppo.StepCheckpoint}
    exec(attached, names | imports | {"data": names["loader"]})
    assert [path.name for path in folder.rglob("*.ckpt")] == ["step-000001.ckpt"]


def test_the_trick_example(folder: Path, tiny_lm: Path, tiny_reward: Path) -> None:
    (folder / "my_tricks.py").write_text(example("ShortAnswers"))
    args = [*ppo_arguments(folder, tiny_lm, tiny_reward), "--trainer.callbacks+=my_tricks.ShortAnswers"]
    run_command("fit", *args, "--trainer.max_steps=1", cwd=folder).ok()
    saved = yaml.safe_load((folder / "runs/ppo/version_0/config.yaml").read_text())
    assert saved["trainer"]["callbacks"][-1] == {"class_path": "my_tricks.ShortAnswers", "init_args": {"coef": 0.01}}


def test_the_rewards_in_yaml_and_the_tags(folder: Path, tiny_lm: Path, tiny_reward: Path) -> None:
    (folder / "my_rewards.py").write_text("def short(responses):\n    return [-len(r.split()) for r in responses]\n")
    (block,) = (block for block in blocks("yaml") if "rewards:" in block)
    (folder / "rewards.yaml").write_text(block.replace("runs/reward/version_0/model", str(tiny_reward)))
    args = [*ppo_arguments(folder, tiny_lm, tiny_reward), "--config", "rewards.yaml"]
    args += ["--trainer.max_steps=1", "--trainer.val_check_interval=1"]
    args = [argument for argument in args if not argument.startswith("--model.rewards.model")]
    run_command("fit", *args, cwd=folder).ok()
    logged = set(EventAccumulator(str(folder / "runs/ppo/version_0")).Reload().Tags()["scalars"])
    assert {"objective/score/helpful", "objective/score/short"} <= logged
    assert _tags_in_the_table() - logged - {name.replace("val/", "test/") for name in logged} == set()


def _tags_in_the_table() -> set[str]:
    """``a/b, c`` in a cell stands for ``a/b`` and ``a/c``."""
    table = README[README.index("| tags | meaning |") : README.index("## Run folders")]
    tags: set[str] = set()
    for row in table.splitlines()[2:]:
        group = ""
        for tag in re.findall(r"`([\w/]+)`", row.split("|")[1] if row.startswith("|") else ""):
            group = tag.split("/")[0] if "/" in tag else group
            tags.add(tag if "/" in tag else f"{group}/{tag}")
    assert len(tags) > 25
    return tags
