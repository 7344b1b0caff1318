"""A PPO module that is not ours, on which the tricks are tested: it fires the hooks on experiences made by hand.

Its actor and critic are linear in random features; its experience is a dataclass of its own.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import lightning as L
import torch
from torch import Tensor, nn

from lit_ppo.callbacks import fire
from tests.helpers.toy_data import FEATURES, TOKENS, Prompts, T


@dataclass
class Rows:
    """The toy's experience; also its minibatch and micro-batch."""

    features: Tensor
    response_ids: Tensor
    response_mask: Tensor
    ended: Tensor
    group: Tensor
    prompt_index: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor | None
    kl: Tensor
    sampling_logprobs: Tensor | None = None
    values: Tensor | None = None
    raw_scores: Tensor | None = None
    scores: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    new_logprobs: Tensor | None = None
    new_entropy: Tensor | None = None
    new_values: Tensor | None = None
    exhausted: bool = False
    tokens: int = 0  # response tokens of the whole optimizer step
    logged: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    held_out: bool = False
    prompts: list[str] = field(default_factory=list)  # of held-out rows alone
    responses: list[str] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    def select(self, rows: Any) -> "Rows":
        """Some of the rows, which share the step's log."""
        extras = {name: x[rows] if isinstance(x, Tensor) else x for name, x in self.extras.items()}
        chosen = {name: x[rows] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **chosen, extras=extras)

    def keep(self, rows: Any) -> None:
        """Some of the rows, in place."""
        vars(self).update(vars(self.select(rows)))

    def mean(self, x: Tensor) -> Tensor:
        """This micro-batch's part of the token mean over the whole step."""
        return x.masked_fill(~self.response_mask, 0.0).sum() / self.tokens

    def log(self, name: str, x: Tensor) -> None:
        """Add to the mean of ``x`` over the step."""
        self.logged[name] = self.logged.get(name, torch.zeros(())) + self.mean(x.detach())


class Critic(nn.Linear):
    """Values, and what callbacks may do to them."""

    @torch.no_grad()
    def rescale_head(self, factor: float, shift: float) -> None:
        self.weight.mul_(factor)
        self.bias.mul_(factor).add_(shift)


class Toy(L.LightningModule):
    """Fires every hook; keeps what the tests look at, one entry an update (``steps``: one an optimizer step).

    Args:
        episodes: Responses an update; their lengths go 1, 2, 3, 4, 1, ...
        minibatch_size: Responses an optimizer step, dealt in micro-batches of two and an empty one.
        scores: Scores of update u, by default normal around 5 with deviation 3.
        longest: Longest response of update u, by default T.
        kl_per_response: Spread evenly over each response's tokens.
        kl_coef: At the start.
        clip_range: Of the ratio; None is no clipping.
        ppo_epochs: Passes over the experience.
        samples_per_prompt: Responses to each of ``episodes`` prompts.
        critic: Whether there is one.
        reference: Whether there is one.
        fires: The hooks that it fires.
    """

    def __init__(
        self,
        episodes: int = 8,
        minibatch_size: int = 4,
        scores: Callable[[int], Sequence[float]] | None = None,
        longest: Callable[[int], int] = lambda update: T,
        kl_per_response: float = 1.0,
        kl_coef: float = 0.1,
        clip_range: float | None = None,
        ppo_epochs: int = 1,
        samples_per_prompt: int = 1,
        critic: bool = True,
        reference: bool = True,
        fires: Callable[[str], bool] = lambda hook: True,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.episodes, self.minibatch_size, self.kl_per_response = episodes, minibatch_size, kl_per_response
        self.given_scores, self.longest, self.fires = scores, longest, fires
        self.kl_coef, self.actor_frozen, self.critic_frozen, self.checkpoint_reference = kl_coef, False, False, False
        self.clip_range, self.ppo_epochs, self.samples_per_prompt = clip_range, ppo_epochs, samples_per_prompt
        self.n_actions = self.n_critic_states = 0
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.actor = nn.Linear(FEATURES, TOKENS)
            self.critic = Critic(FEATURES, 1) if critic else None
            self.reference = nn.Linear(FEATURES, TOKENS).requires_grad_(False) if reference else None
        self.register_buffer("updates", torch.tensor(0))
        self.tokenizer = SimpleNamespace(decode=lambda ids, **kwargs: "".join("abcde"[i] for i in ids))
        self.experiences: list[Rows] = []
        self.actors: list[Tensor] = []
        self.critics: list[Tensor] = []
        self.references: list[Tensor] = []
        self.kl_coefs: list[float] = []
        self.losses: list[dict[str, float]] = []
        self.steps: list[dict[str, float]] = []

    def fire(self, hook: str, *args: Any) -> None:
        if self.fires(hook):
            fire(self, hook, *args)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        models = [self.actor] if self.critic is None else [self.actor, self.critic]
        return [torch.optim.SGD(model.parameters(), lr=0.05) for model in models]

    @property
    def optimizer_of(self) -> dict[str, Any]:
        found = self.optimizers()
        return dict(zip(("actor", "critic"), found if isinstance(found, list) else [found], strict=False))

    @property
    def actor_optimizer(self) -> Any:
        return self.optimizer_of["actor"]

    # ---- an update

    def training_step(self, batch: int, batch_idx: int) -> None:
        self.fire("on_rollout_start", ["a prompt"] * self.episodes)
        experience = self.rollout(int(self.updates))
        data: Any = self.trainer.datamodule
        if data.weights is not None:  # of the responses stay those to the prompts that are drawn
            responses = [(experience.prompt_index == row).nonzero()[:, 0] for row in data.drawn(int(self.updates))]
            experience.keep(torch.cat(responses))
        self.fire("on_rollout_end", experience)
        experience.raw_scores = experience.scores = self.score(experience)
        self.fire("on_scores", experience)
        self.learn(experience)
        self.updates += 1

    def learn(self, experience: Rows) -> None:
        """Minimize the losses, and keep what tests look at."""
        experience.rewards = self.reward_tokens(experience)
        self.fire("on_rewards", experience)
        experience.returns = experience.rewards.flip(1).cumsum(1).flip(1) * experience.response_mask
        experience.advantages = experience.returns - (0.0 if experience.values is None else experience.values)
        self.fire("on_advantages", experience)
        starts = [start for _ in range(self.ppo_epochs) for start in range(0, len(experience), self.minibatch_size)]
        for start in starts:
            if not experience.exhausted:
                self.optimizer_step_of(experience, experience.select(slice(start, start + self.minibatch_size)))
        self.fire("on_update_end", experience)
        self.experiences.append(experience)
        self.kl_coefs.append(self.kl_coef)
        models = ((self.actors, self.actor), (self.critics, self.critic), (self.references, self.reference))
        for kept, model in models:
            kept += [] if model is None else [model.weight.detach().clone()]

    def reward_tokens(self, experience: Rows) -> Tensor:
        rewards = -self.kl_coef * experience.kl
        rewards[torch.arange(len(experience)), experience.response_mask.sum(1) - 1] += experience.scores
        return rewards

    def optimizer_step_of(self, experience: Rows, minibatch: Rows) -> None:
        """An optimizer step of each model that got a gradient."""
        for optimizer in self.optimizer_of.values():
            optimizer.zero_grad()
        self.with_gradients: set[str] = set()
        self.sums: Counter[str] = Counter()
        minibatch.tokens, minibatch.logged = int(minibatch.response_mask.sum()), {}
        self.fire("on_minibatch_start", minibatch)
        minibatch.tokens = int(minibatch.response_mask.sum())  # a callback may have added rows
        for start in [*range(0, len(minibatch), 2), len(minibatch)]:
            self.backward_of(minibatch.select(slice(start, start + 2)))
        metrics = {name: float(value) for name, value in minibatch.logged.items()}
        if not self.actor_frozen:
            metrics["entropy"] = self.sums.pop("mean_entropy")
        if "actor" in self.with_gradients:
            metrics["actor_grad_norm"] = self.norm_of_gradients()
        self.fire("on_minibatch_end", experience, metrics)
        self.steps.append(metrics)
        self.losses.append(dict(self.sums))
        for name, optimizer in self.optimizer_of.items():
            if name in self.with_gradients and not experience.exhausted:
                optimizer.step()

    def backward_of(self, micro: Rows) -> None:
        """Of both models on a micro-batch."""
        if not self.actor_frozen:
            logprobs = self.actor(micro.features).log_softmax(-1)
            micro.new_entropy = -(logprobs.exp() * logprobs).sum(-1)
            micro.new_logprobs = self.logprobs(micro.features, micro.response_ids)
            if "action_ids" in micro.extras:
                micro.extras["new_action_logprobs"] = logprobs.gather(-1, micro.extras["action_ids"])
            log_ratio = micro.new_logprobs - micro.logprobs
            ratio = log_ratio.exp()
            clipped = ratio if self.clip_range is None else ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
            losses = {"policy": micro.mean(-torch.min(ratio * micro.advantages, clipped * micro.advantages))}
            micro.log("approx_kl", ratio - 1 - log_ratio)
            self.fire("on_actor_loss", micro, losses)
            self.backward_losses("actor", losses)
            self.sums["mean_entropy"] += float(micro.mean(micro.new_entropy.detach()))
        if self.critic is not None and not self.critic_frozen:
            micro.new_values = self.critic(micro.features).squeeze(-1)
            losses = {"value": micro.mean(0.5 * (micro.new_values - micro.returns) ** 2)}
            self.fire("on_critic_loss", micro, losses)
            micro.log("value_loss", 0.5 * (micro.new_values - micro.returns) ** 2)
            self.backward_losses("critic", losses)

    def backward_losses(self, model: str, losses: dict[str, Tensor]) -> None:
        """No losses, no backward and no step."""
        if losses:
            self.manual_backward(sum(losses.values()))
            self.with_gradients.add(model)
            self.sums.update({name: float(loss.detach()) for name, loss in losses.items()})

    def norm_of_gradients(self) -> float:
        return float(nn.utils.get_total_norm([p.grad for p in self.actor.parameters() if p.grad is not None]))

    # ---- what callbacks ask for

    def add_extras(self, rows: Rows) -> None:
        """What callbacks ask of training rollouts: the critic gives another token a the value V + a."""
        if self.n_critic_states:
            rows.extras["critic_states"] = rows.features[..., : self.n_critic_states]
        if not self.n_actions:
            return
        random, shape = torch.Generator().manual_seed(int(self.updates)), (*rows.response_ids.shape, self.n_actions)
        others = torch.randint(TOKENS, shape, generator=random)
        ids = rows.extras["action_ids"] = torch.cat([rows.response_ids[..., None], others], dim=-1)
        for name, model in (("action_logprobs", self.actor), ("action_ref_logprobs", self.reference)):
            if model is not None:
                rows.extras[name] = model(rows.features).log_softmax(-1).gather(-1, ids)
        room = rows.response_mask & (torch.arange(shape[1]) < shape[1] - 1)
        rows.extras |= {
            "action_mask": room[..., None] & (others != 0),
            "action_values": self.critic(rows.features) + others,
            "action_states": rows.features[..., None, : self.n_critic_states] + others[..., None],
        }

    @torch.no_grad()
    def rollout(self, prompts: Any, **kwargs: Any) -> Rows:
        """Responses to the prompts of update ``prompts``, ``samples_per_prompt`` of each; or greedy ones to rows."""
        if isinstance(prompts, Rows):
            return self.greedy(prompts, **kwargs)
        if isinstance(prompts, Prompts):
            return self.sampled(prompts.prompts, **kwargs)
        samples, update = self.samples_per_prompt, int(prompts)
        random = torch.Generator().manual_seed(update)
        n = self.episodes * samples
        lengths = torch.arange(n) % self.longest(update) + 1
        features = torch.randn(n, T, FEATURES, generator=random)
        rows = self.rows_of(features, torch.randint(TOKENS, (n, T), generator=random), lengths, samples)
        rows.ended = lengths < T
        rows.sampling_logprobs = rows.logprobs - features[..., 0] * rows.response_mask
        rows.values = None if self.critic is None else self.critic(features).squeeze(-1) * rows.response_mask
        rows.kl = self.kl_per_response / lengths[:, None] * rows.response_mask
        self.add_extras(rows)
        return rows

    def rows_of(self, features: Tensor, response_ids: Tensor, lengths: Tensor, samples: int) -> Rows:
        """Responses of these lengths, ``samples`` to each prompt."""
        mask = torch.arange(T) < lengths[:, None]
        prompt = torch.arange(len(features) // samples).repeat_interleave(samples)
        logprobs = self.logprobs(features, response_ids) * mask
        reference = None if self.reference is None else self.logprobs(features, response_ids, self.reference) * mask
        kl = torch.zeros_like(logprobs) if reference is None else logprobs - reference
        ended = torch.ones(len(features), dtype=torch.bool)
        return Rows(features, response_ids, mask, ended, prompt, prompt, logprobs, reference, kl)

    def sampled(self, prompts: list[str], samples_per_prompt: int, stream: str, **kwargs: Any) -> Rows:
        """Responses to held-out prompts, by the draws of a stream; scored as greedy ones are."""
        n = samples_per_prompt * len(prompts)
        random = torch.Generator().manual_seed(crc32(stream.encode()))
        features = torch.randn(n, T, FEATURES, generator=random)
        probabilities = self.actor(features).softmax(-1)
        ids = torch.multinomial(probabilities.flatten(0, 1), 1, generator=random).view(n, T)
        rows = self.rows_of(features, ids, torch.arange(n) % T + 1, samples_per_prompt)
        rows.held_out, rows.prompts = True, [prompts[i] for i in rows.group]
        pairs = zip(ids, rows.response_mask, strict=True)
        rows.responses = [self.tokenizer.decode(row[mask].tolist()) for row, mask in pairs]
        return rows

    def greedy(self, rows: Rows, policy: str, samples_per_prompt: int, do_sample: bool, **kwargs: Any) -> Rows:
        """The most likely tokens at the positions of each group's first row."""
        assert (samples_per_prompt, do_sample) == (1, False)
        groups = rows.group.tolist()
        chosen = rows.select([groups.index(group) for group in dict.fromkeys(groups)])
        ids = getattr(self, policy)(chosen.features).argmax(-1)
        return replace(chosen, response_ids=ids, group=torch.arange(len(chosen)), held_out=True)

    def score(self, experience: Rows) -> Tensor:
        """What was given, else normal around 5 with deviation 3; of held-out responses the sum of their tokens."""
        if experience.held_out:
            return (experience.response_ids * experience.response_mask).sum(1).float()
        if self.given_scores is not None:
            return torch.tensor(self.given_scores(int(self.updates)))
        random = torch.Generator().manual_seed(int(self.updates))
        return 5 + 3 * torch.randn(len(experience), generator=random)

    def logprobs(self, features: Tensor, response_ids: Tensor, model: nn.Module | None = None) -> Tensor:
        return (model or self.actor)(features).log_softmax(-1).gather(-1, response_ids[..., None]).squeeze(-1)

    def exact_kl(self, minibatch: Rows) -> Tensor:
        """By the definition."""
        log_p, log_q = (model(minibatch.features).log_softmax(-1) for model in (self.actor, self.reference))
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def backward_on_text(self, batch: dict[str, Tensor], coef: float) -> tuple[float, float]:
        """Of :class:`ToyTexts`: the mean over all tokens of the batch."""
        loss = -self.logprobs(batch["features"], batch["actions"]).mean()
        self.manual_backward(coef * loss)
        return loss.item(), self.norm_of_gradients()

    @torch.no_grad()
    def loss_on_text(self, batch: dict[str, Tensor]) -> tuple[float, int]:
        """The same, and the number of tokens."""
        return -self.logprobs(batch["features"], batch["actions"]).mean().item(), batch["actions"].numel()


class TwoUpdates(Toy):
    """Makes two updates of each rollout."""

    def learn(self, experience: Rows) -> None:
        super().learn(experience)
        super().learn(experience)
