"""A small PPO job that several tests run: prompts, a reward by counting words, a module with SGD."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger

from lit_ppo import LitPPO, PromptDataModule, TextDataModule
from tests.helpers.tiny import WORDS, write_rows

GOOD = ("good", "great", "loved", "bright", "happy")


class MemoryLogger(Logger):
    """Keeps every row that is logged."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.hyperparams = args


def count_good(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """How many good words a response has."""
    return [float(sum(word in GOOD for word in response.split())) for response in responses]


def variety(prompts: list[str], responses: list[str]) -> list[float]:
    """What the reward should have asked for: different words."""
    return [float(len(set(response.split()))) for response in responses]


def write_prompts(path: Path, n: int = 12) -> Path:
    """Prompts of one to four words, all different."""
    rows = [{"prompt": " ".join(WORDS[i : i + 1 + i % 4]), "level": i} for i in range(n)]
    write_rows(path, rows)
    return path


def texts(folder: Path) -> TextDataModule:
    """Seven texts of two to seven words, in batches of three."""
    rows = [{"text": " ".join(WORDS[i : i + 2 + i % 6])} for i in range(7)]
    return TextDataModule(write_rows(folder / "texts.jsonl", rows), max_length=8, batch_size=3, seed=0)


def make_module(actor: Path, **overrides: Any) -> LitPPO:
    """A module with plain SGD: an Adam step hides errors and magnifies noise."""
    arguments: dict[str, Any] = {
        "rewards": count_good,
        "generation": {"max_new_tokens": 10},
        "minibatch_size": 5,
        "micro_batch_size": 3,
        "ppo_epochs": 2,
        "kl_coef": 0.1,
        "actor_optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
        "critic_optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
        "max_grad_norm": None,
        "seed": 3,
    }
    return LitPPO(str(actor), **{**arguments, **overrides})


def make_trainer(folder: Path, **overrides: Any) -> L.Trainer:
    """A quiet trainer on one CPU process that logs every update."""
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "max_epochs": -1,
        "default_root_dir": folder,
        "logger": MemoryLogger(),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "inference_mode": False,
    }
    return L.Trainer(**{**arguments, **overrides})


def make_data(folder: Path, **overrides: Any) -> PromptDataModule:
    """Prompts in batches of 7: no number of ranks divides it."""
    return PromptDataModule(str(write_prompts(folder / "prompts.jsonl")), **{"batch_size": 7, "seed": 0, **overrides})


def run(folder: Path, actor: Path, **overrides: Any) -> tuple[LitPPO, list[dict[str, float]]]:
    """Train for two updates; returns the module and what was logged at each."""
    module = make_module(actor, **overrides)
    trainer = make_trainer(folder)
    trainer.fit(module, make_data(folder))
    return module, logged(trainer)


def logged(trainer: L.Trainer) -> list[dict[str, float]]:
    """The metrics of each update."""
    logger: Any = trainer.logger
    return [row for row in logger.rows if "objective/score" in row]
