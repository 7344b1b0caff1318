"""Arguments with which ``configs/ppo.yaml`` runs on tiny models."""

import json
from pathlib import Path

import yaml

from tests.helpers.command import REPOSITORY
from tests.helpers.tiny import WORDS

RECIPES = ("grpo", "instructgpt", "llama2", "openai_2019", "ppo_max", "reinforce_pp", "rloo")  # beside configs/ppo.yaml


def write_prompts(folder: Path, n: int = 16) -> None:
    """``prompts.jsonl``."""
    rows = [{"prompt": f"the {word} was", "level": i} for i, word in enumerate(WORDS[:n])]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ppo_arguments(folder: Path, lm: Path, reward: Path) -> list[str]:
    """``configs/ppo.yaml`` with paths and sizes overridden."""
    write_prompts(folder)
    paths = [f"--model.actor={lm}", f"--model.rewards.model={reward}", "--data.path=prompts.jsonl"]
    sizes = ["--data.batch_size=8", "--model.minibatch_size=4", "--model.micro_batch_size=2"]
    lengths = ["--model.generation.max_new_tokens=6", "--data.max_prompt_length=8"]
    validation = ["--trainer.val_check_interval=1.0", "--data.val_fraction=0.25"]
    config = str(REPOSITORY / "configs" / "ppo.yaml")
    return ["--config", config, *paths, *sizes, *lengths, *validation, "--trainer.accelerator=cpu"]


def ppo(folder: Path, actor: Path) -> list[str]:
    """Small arguments of ``configs/ppo.yaml`` with a reward that is a function."""
    write_prompts(folder)
    overlay = {
        "model": {
            "init_args": {
                "actor": str(actor),
                "rewards": {"class_path": "RewardFunction", "init_args": {"function": "tests.helpers.toys.count_good"}},
                "generation": {"max_new_tokens": 6},
                "minibatch_size": 8,
                "ppo_epochs": 1,
            }
        },
        "data": {"init_args": {"batch_size": 8, "max_prompt_length": None, "val_fraction": 0.0}},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "max_epochs": -1, "val_check_interval": None},
        "report": {"prompts": 0, "samples": 0},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(overlay))
    return ["fit", "--config", str(REPOSITORY / "configs/ppo.yaml"), "--config", "small.yaml"]
