"""Somebody's project, which tests/test_packaging.py checks with ``mypy --strict`` against the installed wheel."""

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

import lit_ppo
from lit_ppo import GAE, Experience, LitPPO, PromptDataModule, RewardFunction, RewardModel, StepCheckpoint
from lit_ppo.callbacks import AdaptiveKL, PPOCallback
from lit_ppo.callbacks.base import ExperienceLike, PPOModule


class ShortAnswers(PPOCallback):
    """A trick."""

    def __init__(self, coef: float = 0.01) -> None:
        self.coef = coef

    @override
    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        scores: Tensor = experience.scores
        experience.scores = scores - self.coef * experience.response_mask.sum(dim=1)


class MyPPO(LitPPO):
    """Another training step."""

    def __init__(self, actor: str, margin: float = 0.0, **kwargs: Any) -> None:
        super().__init__(actor, **kwargs)
        self.margin = margin

    @override
    def update(self, experience: Experience) -> None:
        experience.scores = experience.scores.clamp(min=self.margin)
        super().update(experience)


class MyPrompts(PromptDataModule):
    """Other data."""

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)


def length(prompts: list[str], responses: list[str], **columns: list[Any]) -> list[float]:
    """A reward."""
    return [float(len(response)) for response in responses]


def main() -> str:
    """A run."""
    rewards = {"length": RewardFunction(length), "helpful": RewardModel("folder", batch_size=8)}
    module = MyPPO("folder", rewards=rewards, advantages=GAE(lam=0.95), generation={"max_new_tokens": 8})
    trainer = L.Trainer(max_steps=1, callbacks=[ShortAnswers(), AdaptiveKL(target=6.0), StepCheckpoint()])
    trainer.fit(module, MyPrompts(["Hello"], batch_size=4))
    experience: Experience = module.rollout(["Hello"])
    experience.scores = length(experience.prompts, experience.responses)  # a list
    experience.scores = np.array([1.0])
    experience.scores = torch.tensor([1.0])
    highest: Tensor = experience.scores.max()
    metrics: dict[str, float] = module.step(experience)
    module.save_pretrained("out")
    return f"{lit_ppo.__version__}: {metrics}, {highest}"
