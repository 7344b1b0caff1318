"""The tricks on a LightningModule of your own: a small recurrent policy learns to write rising digits.

    python examples/own_module.py

For the tricks the module has attributes that they set (``kl_coef``, ``clip_range``, ``ppo_epochs``, ``actor_frozen``),
an experience whose fields have the usual names, and a call of ``fire`` at each place where a trick may act.
"""

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_ppo.callbacks import AdaptiveKL, CriticWarmup, Experience, RewardNormalization, fire
from lit_ppo.functional import entropy, gae, kl_estimate, policy_loss, token_logprobs, token_rewards, value_loss

DIGITS, LENGTH, ROWS, WIDTH = 10, 8, 256, 32


class Recurrent(nn.Module):
    """A GRU that reads the digits before each position and returns some numbers for it."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(DIGITS + 1, WIDTH)  # the last one starts a sequence
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, n_outputs)

    def forward(self, digits: Tensor) -> Tensor:
        """Outputs at each position, (B, T, n_outputs)."""
        before = torch.cat([torch.full_like(digits[:, :1], DIGITS), digits[:, :-1]], dim=1)
        outputs: Tensor = self.out(self.cell(self.embed(before))[0])
        return outputs


class RisingDigits(L.LightningModule):
    """PPO written by hand, with hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.actor, self.critic = Recurrent(DIGITS), Recurrent(1)
        self.reference = copy.deepcopy(self.actor).requires_grad_(False)
        self.kl_coef, self.clip_range, self.ppo_epochs, self.actor_frozen = 0.1, 0.2, 4, False  # callbacks may set them

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One update, with its hooks."""
        fire(self, "on_rollout_start", range(ROWS))
        experience = self.rollout()
        fire(self, "on_rollout_end", experience)
        experience.scores = 100.0 * (experience.digits.diff(dim=1) > 0).sum(dim=1)  # RewardNormalization is needed
        fire(self, "on_scores", experience)
        experience.rewards = token_rewards(
            experience.scores, experience.kl, experience.response_mask, kl_coef=self.kl_coef
        )
        fire(self, "on_rewards", experience)
        experience.advantages, experience.returns = gae(experience.rewards, experience.values, experience.response_mask)
        fire(self, "on_advantages", experience)
        for minibatch in experience.minibatches(ROWS, epochs=self.ppo_epochs):
            if experience.exhausted:  # set by KLEarlyStop
                break
            self.step(experience, minibatch)
        fire(self, "on_update_end", experience)
        kl = experience.kl.sum(dim=1).mean()
        self.log_dict({"score": experience.raw_scores.mean(), "kl": kl, "kl_coef": self.kl_coef}, prog_bar=True)

    @torch.no_grad()
    def rollout(self) -> Experience:
        """Sample digits."""
        digits = torch.zeros(ROWS, LENGTH, dtype=torch.long)
        for t in range(LENGTH):
            digits[:, t] = torch.distributions.Categorical(logits=self.actor(digits)[:, t]).sample()
        return Experience(  # response_mask and kl follow from log-probs
            digits=digits,
            logprobs=token_logprobs(self.actor(digits), digits),
            ref_logprobs=token_logprobs(self.reference(digits), digits),
            values=self.critic(digits).squeeze(-1),
        )

    def step(self, experience: Experience, minibatch: Experience) -> None:
        """One optimizer step of actor and critic."""
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        fire(self, "on_minibatch_start", minibatch)
        digits = minibatch.digits
        if not self.actor_frozen:  # set by CriticWarmup
            logits, old, advantages = self.actor(digits), minibatch.logprobs, minibatch.advantages
            minibatch.new_logprobs, minibatch.new_entropy = token_logprobs(logits, digits), entropy(logits)
            minibatch.log("approx_kl", kl_estimate(old, minibatch.new_logprobs, "k3"))
            losses = {"policy": minibatch.mean(policy_loss(minibatch.new_logprobs, old, advantages, self.clip_range))}
            fire(self, "on_actor_loss", minibatch, losses)
            self.manual_backward(torch.stack(list(losses.values())).sum())
        minibatch.new_values = self.critic(digits).squeeze(-1)
        losses = {"value": minibatch.mean(value_loss(minibatch.new_values, minibatch.returns))}
        fire(self, "on_critic_loss", minibatch, losses)
        self.manual_backward(torch.stack(list(losses.values())).sum())
        metrics = {name: float(value) for name, value in minibatch.metrics.items()}
        fire(self, "on_minibatch_end", experience, metrics)
        for optimizer in [] if experience.exhausted else self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(model.parameters(), lr=0.01) for model in (self.actor, self.critic)]

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(60), batch_size=None)  # type: ignore[arg-type]  # 60 updates; a range is a data set


def train(callbacks: list[L.Callback], **trainer: Any) -> RisingDigits:
    """Train with these tricks."""
    L.seed_everything(0)
    module = RisingDigits()
    L.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, logger=False, **trainer).fit(module)
    return module


if __name__ == "__main__":
    train([RewardNormalization(clip=5.0), CriticWarmup(updates=5), AdaptiveKL(target=6.0, horizon=2_000)])
