"""Rewards of your own: rules in Python, their weighted sum, and a column of the data.

lit-ppo fit --config quickstart  # once: trains the small language model that is the default here
python own_reward.py [MODEL]
"""

import sys

import lightning as L

from lit_ppo import LitPPO, PromptDataModule
from lit_ppo.callbacks import AdaptiveKL, AdvantageNormalization

PRAISE = {"great", "bright", "happy", "loved", "superb", "wonderful", "lovely", "excellent", "delightful", "perfect"}
PROMPTS = [
    {"prompt": "the plot was", "topic": "film"},
    {"prompt": "the music was", "topic": "film"},
    {"prompt": "the sauce was", "topic": "meal"},
    {"prompt": "we loved the", "topic": "meal"},
]


def praise(responses: list[str]) -> list[float]:
    """Words of praise in each response, at most three."""
    return [min(3.0, sum(word in PRAISE for word in response.split())) for response in responses]


def on_topic(responses: list[str], topic: list[str]) -> list[float]:
    """1 if a response names its topic; ``topic`` is a column of the data."""
    return [float(word in response.split()) for response, word in zip(responses, topic, strict=True)]


def brief(responses: list[str], budget: int = 12) -> list[float]:
    """Words over the budget, as a negative number."""
    return [float(min(0, budget - len(response.split()))) for response in responses]


def train(model: str, epochs: int = 20) -> L.Trainer:
    """Train on the weighted sum of three rewards; a fourth one only watches."""
    L.seed_everything(0)
    ppo = LitPPO(
        model,
        rewards={
            "praise": praise,
            "on_topic": {"source": on_topic, "weight": 0.5},
            "brief": {"source": brief, "weight": 0.1},
        },
        eval_rewards={"distinct": lambda responses: [len({*r.split()}) / max(1, len(r.split())) for r in responses]},
        generation={"max_new_tokens": 16},
        samples_per_prompt=8,
        minibatch_size=16,
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
