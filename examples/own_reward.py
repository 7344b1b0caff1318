"""Rewards of your own: rules in Python, their weighted sum, and a column of the data.

lit-ppo fit --config quickstart  # once: trains the small language model that is the default here
python own_reward.py [MODEL]
"""

import sys

import lightning as L
import torch

from lit_ppo import LitPPO, PromptDataModule
from lit_ppo.callbacks import AdaptiveKL, AdvantageNormalization

PRAISE = {
    "superb",
    "wonderful",
    "brilliant",
    "lovely",
    "excellent",
    "delightful",
    "great",
    "perfect",
    "loved",
    "stunning",
}
PROMPTS = [
    {"prompt": "the plot was", "word": "scene"},
    {"prompt": "the melody was", "word": "song"},
    {"prompt": "the sauce was", "word": "bite"},
    {"prompt": "the view was", "word": "night"},
]


def praise(responses: list[str]) -> list[float]:
    """Words of praise in each response, at most three."""
    return [min(3.0, sum(w.strip(".,") in PRAISE for w in response.split())) for response in responses]


def on_topic(responses: list[str], word: list[str]) -> list[float]:
    """1 if a response has its word; ``word`` is a column of the data."""
    return [float(mine in response) for response, mine in zip(responses, word, strict=True)]


def brief(responses: list[str], budget: int = 12) -> list[float]:
    """Words over the budget, as a negative number."""
    return [float(min(0, budget - len(response.split()))) for response in responses]


def train(model: str, epochs: int = 40) -> L.Trainer:
    """Train on the weighted sum of three rewards; a fourth one only watches."""
    L.seed_everything(0)
    ppo = LitPPO(
        model,
        rewards={
            "praise": praise,
            "on_topic": {"source": on_topic, "weight": 1.0},
            "brief": {"source": brief, "weight": 0.1},
        },
        eval_rewards={"distinct": lambda responses: [len({*r.split()}) / max(1, len(r.split())) for r in responses]},
        generation={"max_new_tokens": 16},
        samples_per_prompt=8,
        minibatch_size=16,
        actor_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-4),  # a small model learns fast
        critic_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    data = PromptDataModule(PROMPTS, val_path=PROMPTS, batch_size=4)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[AdvantageNormalization(), AdaptiveKL(target=6.0, horizon=500)],
        default_root_dir="runs/own_reward",
        log_every_n_steps=1,
    )
    trainer.fit(ppo, data)
    ppo.save_pretrained("runs/own_reward/model")
    return trainer


if __name__ == "__main__":
    train(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart/sft/model")
