"""PPO in a loop of your own: sample, score in any way, step.

    lit-ppo fit --config quickstart  # once: trains the small language model that is the default here
    python examples/own_loop.py [MODEL]

The loop is yours. A ``Trainer`` gives it callbacks, precision, strategy, logger and checkpoints.
"""

import sys

import lightning as L
import torch

from lit_ppo import LitPPO, StepCheckpoint
from lit_ppo.callbacks import AdaptiveKL, AdvantageNormalization

PROMPTS = ["the plot was", "the music was", "the sauce was", "we loved the", "we saw a"]
PRAISE = {"great", "bright", "happy", "loved", "superb", "wonderful", "lovely", "excellent", "delightful", "perfect"}


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """Any code of yours: a model, a service, people."""
    return [float(sum(word in PRAISE for word in response.split())) for response in responses]


def train(model: str, updates: int = 20) -> list[float]:
    """Train for some updates; returns the mean score of each."""
    L.seed_everything(0)
    ppo = LitPPO(
        model,
        generation={"max_new_tokens": 16},
        samples_per_prompt=8,
        minibatch_size=20,
        actor_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-4),
        critic_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    trainer = L.Trainer(
        max_steps=updates,
        accelerator="cpu",
        callbacks=[
            AdvantageNormalization(),
            AdaptiveKL(target=6.0, horizon=500),
            StepCheckpoint(every_n_train_steps=10),
        ],
        default_root_dir="runs/own_loop",
        log_every_n_steps=1,
    )
    scores = []
    with ppo.attach(trainer) as loop:
        while not loop.ended:
            experience = ppo.rollout(PROMPTS)
            experience.scores = score(experience.prompts, experience.responses)
            metrics = ppo.step(experience)
            scores.append(metrics["objective/score"])
    ppo.save_pretrained("runs/own_loop/model")
    return scores


if __name__ == "__main__":
    print(train(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart/sft/model"))
