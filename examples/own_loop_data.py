"""PPO in a loop of your own, with prompts that the Trainer draws."""

import lightning as L

from lit_ppo import LitPPO, PromptDataModule, StepCheckpoint
from lit_ppo.callbacks import AdaptiveKL


def train(model: str, updates: int = 20, prompts: str = "prompts.jsonl") -> None:
    """Train for some updates on a file of prompts; the score is the number of words."""
    ppo = LitPPO(model, generation={"max_new_tokens": 16}, minibatch_size=16)
    data = PromptDataModule(prompts, batch_size=16)
    # --8<-- [start:loop]
    trainer = L.Trainer(
        max_steps=updates,
        callbacks=[AdaptiveKL(), StepCheckpoint()],
        default_root_dir="runs/own_loop",
        log_every_n_steps=1,
    )
    with ppo.attach(trainer, data) as batches:
        for prompts in batches:
            experience = ppo.rollout(prompts)
            experience.scores = [float(len(response.split())) for response in experience.responses]
            ppo.step(experience)
    # --8<-- [end:loop]
