"""The tricks on a LightningModule of your own: a small recurrent policy learns to write rising digits.

    python examples/own_module.py

For the tricks the module has four attributes (``kl_coef``, ``actor_frozen``, ``critic``, ``reference``), an experience
whose fields have the usual names, and a call of ``fire`` at each place where a trick may act.
"""

import copy
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_ppo.callbacks import AdaptiveKL, CriticWarmup, RewardNormalization, fire
from lit_ppo.functional import gae, kl_estimate, masked_mean, policy_loss, token_rewards, value_loss

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


def logprobs_of(model: nn.Module, digits: Tensor) -> Tensor:
    """Log-probabilities of the digits, (B, T)."""
    logprobs: Tensor = model(digits).log_softmax(-1).gather(-1, digits.unsqueeze(-1)).squeeze(-1)
    return logprobs


class RisingDigits(L.LightningModule):
    """PPO written by hand, with hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.actor, self.critic = Recurrent(DIGITS), Recurrent(1)
        self.reference = copy.deepcopy(self.actor).requires_grad_(False)
        self.kl_coef, self.actor_frozen = 0.1, False  # set by AdaptiveKL and CriticWarmup

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One update, with its hooks."""
        fire(self, "on_rollout_start", range(ROWS))
        experience = self.rollout()
        fire(self, "on_scores", experience)
        experience.rewards = token_rewards(
            experience.scores, experience.kl, experience.response_mask, kl_coef=self.kl_coef
        )
        fire(self, "on_rewards", experience)
        experience.advantages, experience.returns = gae(experience.rewards, experience.values, experience.response_mask)
        for _ in range(4):
            self.step(experience)
        fire(self, "on_update_end", experience)
        kl = experience.kl.sum(dim=1).mean()
        self.log_dict({"score": experience.raw_scores.mean(), "kl": kl, "kl_coef": self.kl_coef}, prog_bar=True)

    @torch.no_grad()
    def rollout(self) -> SimpleNamespace:
        """Sample digits and score them."""
        digits = torch.zeros(ROWS, LENGTH, dtype=torch.long)
        for t in range(LENGTH):
            digits[:, t] = torch.distributions.Categorical(logits=self.actor(digits)[:, t]).sample()
        logprobs, ref_logprobs = logprobs_of(self.actor, digits), logprobs_of(self.reference, digits)
        scores = 100.0 * (digits.diff(dim=1) > 0).sum(dim=1)  # far from variance 1: RewardNormalization is needed
        return SimpleNamespace(
            digits=digits,
            response_mask=torch.ones_like(digits, dtype=torch.bool),
            logprobs=logprobs,
            kl=kl_estimate(logprobs, ref_logprobs),
            values=self.critic(digits).squeeze(-1),
            raw_scores=scores,
            scores=scores,
        )

    def step(self, experience: SimpleNamespace) -> None:
        """One optimizer step of actor and critic."""
        actor_optimizer, critic_optimizer = self.optimizers()
        mask = experience.response_mask
        if not self.actor_frozen:
            loss = policy_loss(logprobs_of(self.actor, experience.digits), experience.logprobs, experience.advantages)
            actor_optimizer.zero_grad()
            self.manual_backward(masked_mean(loss, mask))
            actor_optimizer.step()
        loss = value_loss(self.critic(experience.digits).squeeze(-1), experience.returns)
        critic_optimizer.zero_grad()
        self.manual_backward(masked_mean(loss, mask))
        critic_optimizer.step()

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
