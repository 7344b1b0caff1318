"""A PPO module that is not ours, on which the tricks are tested: it fires the hooks on experiences made by hand.

Its actor and critic are linear in random features; its experience is a dataclass of its own.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_ppo.callbacks import fire
from tests.helpers.toys import make_trainer

T, FEATURES, TOKENS = 4, 3, 5  # longest response, numbers that describe a position, vocabulary


@dataclass
class Rows:
    """The toy's experience; also its minibatch and micro-batch."""

    features: Tensor
    actions: Tensor
    response_mask: Tensor
    ended: Tensor
    group: Tensor
    prompt_index: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None
    kl: Tensor
    raw_scores: Tensor | None = None
    scores: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    exhausted: bool = False
    new_logprobs: Tensor | None = None
    new_entropy: Tensor | None = None
    new_values: Tensor | None = None
    tokens: int = 0  # response tokens of the whole optimizer step
    logged: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    greedy: bool = False
    prompts: list[str] = field(default_factory=list)  # of held-out rows alone
    responses: list[str] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def response_ids(self) -> Tensor:
        return self.actions

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, start: int, stop: int) -> "Rows":
        """Some of the rows, as a copy that shares the step's log."""
        return self.select(torch.arange(len(self))[start:stop])

    def select(self, rows: Any) -> "Rows":
        """Some of the rows, as a copy."""
        cut = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rows(**{k: v[rows] if isinstance(v, Tensor) else v for k, v in cut.items()})

    def keep(self, rows: Any) -> None:
        """Some of the rows, in place."""
        vars(self).update(vars(self.select(rows)))

    def mean(self, x: Tensor) -> Tensor:
        """This micro-batch's part of the token mean over the whole step."""
        return x.masked_fill(~self.response_mask, 0.0).sum() / self.tokens

    def log(self, name: str, x: Tensor) -> None:
        """Add to the mean of ``x`` over the step."""
        self.logged[name] = self.logged.get(name, torch.zeros(())) + self.mean(x.detach())


@dataclass
class Prompts:
    """What the toy's data hands out to look at: their number is what the toy responds to."""

    prompts: list[str]


class Words:
    """The toy's tokenizer: a token is a letter."""

    def decode(self, ids: Sequence[int], **kwargs: Any) -> str:
        return "".join("abcde"[i] for i in ids)


class ToyData(L.LightningDataModule):
    """The toy's data set: every row once an update, or all rows that have a weight, drawn by it one after another.

    It saves nothing: a trick that sets weights has to set them again.
    """

    peeks = ("train", "val")  # splits that can be looked at

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.columns = {"level": list(range(rows)), "size": [float(-row) for row in range(rows)]}
        self.weights: Tensor | None = None

    def set_weights(self, weights: Any) -> None:
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64).clone()

    def drawn(self, update: int) -> list[int]:
        assert self.weights is not None
        n, random = int(self.weights.count_nonzero()), torch.Generator().manual_seed(update)
        rows: list[int] = torch.multinomial(self.weights, n, generator=random).tolist()
        return rows

    def peek(self, split: str, n: int) -> Prompts | None:
        return Prompts([f"prompt {i}" for i in range(min(n, 5))]) if split in self.peeks else None

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader([0], batch_size=None)  # an epoch is an update


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
        self.kl_coef, self.actor_frozen, self.checkpoint_reference = kl_coef, False, False
        self.clip_range, self.ppo_epochs, self.samples_per_prompt = clip_range, ppo_epochs, samples_per_prompt
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.actor = nn.Linear(FEATURES, TOKENS)
            self.critic = Critic(FEATURES, 1) if critic else None
            self.reference = nn.Linear(FEATURES, TOKENS).requires_grad_(False) if reference else None
        self.register_buffer("updates", torch.tensor(0))
        self.tokenizer = Words()
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

    def training_step(self, batch: int, batch_idx: int) -> None:
        self.fire("on_rollout_start", ["a prompt"] * self.episodes)
        experience = self.rollout(int(self.updates))
        self.draw(experience)
        self.fire("on_rollout_end", experience)
        experience.raw_scores = experience.scores = self.score(experience)
        self.fire("on_scores", experience)
        self.learn(experience)
        self.updates += 1

    def draw(self, experience: Rows) -> None:
        """Leave the responses to the prompts that the data draws, where it draws by weight."""
        data: Any = self.trainer.datamodule
        if data.weights is not None:
            responses = [(experience.prompt_index == row).nonzero()[:, 0] for row in data.drawn(int(self.updates))]
            experience.keep(torch.cat(responses))

    def learn(self, experience: Rows) -> None:
        experience.rewards = self.reward_tokens(experience)
        self.fire("on_rewards", experience)
        experience.returns = experience.rewards.flip(1).cumsum(1).flip(1) * experience.response_mask
        values = 0.0 if experience.values is None else experience.values
        experience.advantages = experience.returns - values
        self.fire("on_advantages", experience)
        starts = [start for _ in range(self.ppo_epochs) for start in range(0, len(experience), self.minibatch_size)]
        for start in starts:
            if not experience.exhausted:
                self.optimizer_step_of(experience, experience.rows(start, start + self.minibatch_size))
        self.fire("on_update_end", experience)
        self.remember(experience)

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
        rows.values = None if self.critic is None else self.critic(features).squeeze(-1) * rows.response_mask
        rows.kl = self.kl_per_response / lengths[:, None] * rows.response_mask
        return rows

    def rows_of(self, features: Tensor, actions: Tensor, lengths: Tensor, samples: int) -> Rows:
        """Responses of these lengths, ``samples`` to each prompt."""
        mask = torch.arange(T) < lengths[:, None]
        prompt = torch.arange(len(features) // samples).repeat_interleave(samples)
        logprobs = self.logprobs(features, actions) * mask
        reference = None if self.reference is None else self.logprobs(features, actions, self.reference) * mask
        return Rows(
            features=features,
            actions=actions,
            response_mask=mask,
            ended=torch.ones(len(features), dtype=torch.bool),
            group=prompt,
            prompt_index=prompt,
            logprobs=logprobs,
            ref_logprobs=reference,
            values=None,
            kl=torch.zeros_like(logprobs) if reference is None else logprobs - reference,
        )

    def sampled(self, prompts: list[str], samples_per_prompt: int, stream: str, **kwargs: Any) -> Rows:
        """Responses to held-out prompts, by the draws of a stream; scored as greedy ones are."""
        n = samples_per_prompt * len(prompts)
        random = torch.Generator().manual_seed(crc32(stream.encode()))
        features = torch.randn(n, T, FEATURES, generator=random)
        probabilities = self.actor(features).softmax(-1)
        actions = torch.multinomial(probabilities.flatten(0, 1), 1, generator=random).view(n, T)
        rows = self.rows_of(features, actions, torch.arange(n) % T + 1, samples_per_prompt)
        rows.greedy, rows.prompts = True, [prompts[i] for i in rows.group]
        pairs = zip(actions, rows.response_mask, strict=True)
        rows.responses = [self.tokenizer.decode(row[mask].tolist()) for row, mask in pairs]
        return rows

    def greedy(self, rows: Rows, policy: str, samples_per_prompt: int, do_sample: bool, **kwargs: Any) -> Rows:
        """The most likely actions at the positions of each group's first row."""
        assert (samples_per_prompt, do_sample) == (1, False)
        groups = rows.group.tolist()
        chosen = rows.select([groups.index(group) for group in dict.fromkeys(groups)])
        chosen.actions = getattr(self, policy)(chosen.features).argmax(-1)
        chosen.group, chosen.greedy = torch.arange(len(chosen)), True
        return chosen

    def score(self, experience: Rows) -> Tensor:
        """What was given, else normal around 5 with deviation 3; of greedy responses the sum of their actions."""
        if experience.greedy:
            return (experience.actions * experience.response_mask).sum(1).float()
        if self.given_scores is not None:
            return torch.tensor(self.given_scores(int(self.updates)))
        random = torch.Generator().manual_seed(int(self.updates))
        return 5 + 3 * torch.randn(len(experience), generator=random)

    def exact_kl(self, minibatch: Rows) -> Tensor:
        """By the definition."""
        log_p, log_q = (model(minibatch.features).log_softmax(-1) for model in (self.actor, self.reference))
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    @property
    def actor_optimizer(self) -> Any:
        optimizers = self.optimizers()
        return optimizers[0] if isinstance(optimizers, list) else optimizers

    def reward_tokens(self, experience: Rows) -> Tensor:
        rewards = -self.kl_coef * experience.kl
        for row, length in enumerate(experience.response_mask.sum(1).tolist()):
            rewards[row, length - 1] += experience.scores[row]
        return rewards

    def logprobs(self, features: Tensor, actions: Tensor, model: nn.Module | None = None) -> Tensor:
        return (model or self.actor)(features).log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)

    def optimizer_step_of(self, experience: Rows, minibatch: Rows) -> None:
        actor, critic = (self.optimizers(), None) if self.critic is None else self.optimizers()
        for optimizer in filter(None, (actor, critic)):
            optimizer.zero_grad()
        self.with_gradients: set[str] = set()
        minibatch.tokens, minibatch.logged = int(minibatch.response_mask.sum()), {}
        self.fire("on_minibatch_start", minibatch)
        sums: dict[str, float] = {}
        for micro in self.micro_batches(minibatch):
            self.backward_of(micro, sums)
        metrics = {name: float(value) for name, value in minibatch.logged.items()}
        if not self.actor_frozen:
            metrics["entropy"] = sums.pop("mean_entropy")
        if "actor" in self.with_gradients:
            metrics["actor_grad_norm"] = self.norm_of_gradients()
        self.fire("on_minibatch_end", experience, metrics)
        self.steps.append(metrics)
        self.losses.append(sums)
        if experience.exhausted:
            return
        if "actor" in self.with_gradients:
            actor.step()
        if "critic" in self.with_gradients:
            critic.step()

    def micro_batches(self, minibatch: Rows) -> Iterator[Rows]:
        for start in range(0, len(minibatch), 2):
            yield minibatch.rows(start, start + 2)
        yield minibatch.rows(0, 0)

    def backward_of(self, micro: Rows, sums: dict[str, float]) -> None:
        if not self.actor_frozen:
            logprobs = self.actor(micro.features).log_softmax(-1)
            micro.new_entropy = -(logprobs.exp() * logprobs).sum(-1)
            micro.new_logprobs = self.logprobs(micro.features, micro.actions)
            log_ratio = micro.new_logprobs - micro.logprobs
            ratio = log_ratio.exp()
            clipped = ratio if self.clip_range is None else ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
            losses = {"policy": micro.mean(-torch.min(ratio * micro.advantages, clipped * micro.advantages))}
            micro.log("approx_kl", ratio - 1 - log_ratio)
            self.fire("on_actor_loss", micro, losses)
            self.backward_losses("actor", losses)
            _add(sums, losses | {"mean_entropy": micro.mean(micro.new_entropy)})
        if self.critic is not None:
            micro.new_values = self.critic(micro.features).squeeze(-1)
            losses = {"value": micro.mean(0.5 * (micro.new_values - micro.returns) ** 2)}
            self.fire("on_critic_loss", micro, losses)
            micro.log("value_loss", 0.5 * (micro.new_values - micro.returns) ** 2)
            self.backward_losses("critic", losses)
            _add(sums, losses)

    def backward_losses(self, model: str, losses: dict[str, Tensor]) -> None:
        """No losses, no backward and no step."""
        if losses:
            self.manual_backward(sum(losses.values()))
            self.with_gradients.add(model)

    def backward_on_text(self, batch: dict[str, Tensor], coef: float) -> tuple[float, float]:
        """Of :class:`ToyTexts`: the mean over all tokens of the batch."""
        loss = -self.logprobs(batch["features"], batch["actions"]).mean()
        self.manual_backward(coef * loss)
        return loss.item(), self.norm_of_gradients()

    @torch.no_grad()
    def loss_on_text(self, batch: dict[str, Tensor]) -> tuple[float, int]:
        """The same, and the number of tokens."""
        return -self.logprobs(batch["features"], batch["actions"]).mean().item(), batch["actions"].numel()

    def norm_of_gradients(self) -> float:
        """The actor's."""
        return float(nn.utils.get_total_norm([p.grad for p in self.actor.parameters() if p.grad is not None]))

    def remember(self, experience: Rows) -> None:
        self.experiences.append(experience)
        self.actors.append(self.actor.weight.detach().clone())
        if self.critic is not None:
            self.critics.append(self.critic.weight.detach().clone())
        if self.reference is not None:
            self.references.append(self.reference.weight.clone())
        self.kl_coefs.append(self.kl_coef)


class TwoUpdates(Toy):
    """Makes two updates of each rollout."""

    def learn(self, experience: Rows) -> None:
        super().learn(experience)
        super().learn(experience)


def _add(sums: dict[str, float], losses: dict[str, Tensor]) -> None:
    for name, value in losses.items():
        sums[name] = sums.get(name, 0.0) + float(value.detach())


class ToyTexts(L.LightningDataModule):
    """Five texts that the toy can learn from, in batches of two; knows nothing of lit_ppo.

    Args:
        seed: Of the texts and, if the one who draws them asks for it, of their order.
        shuffle: As a ``DataLoader`` takes it.
    """

    def __init__(self, seed: int = 0, shuffle: bool = True) -> None:
        super().__init__()
        self.seed, self.shuffle = seed, shuffle
        self.calls: list[str] = []
        self.pages = 0  # read so far, says this data module

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}" + (" with a trainer" if self.trainer is not None else ""))
        random = torch.Generator().manual_seed(self.seed)
        features = torch.randn(5, T, FEATURES, generator=random)
        actions = torch.randint(TOKENS, (5, T), generator=random)
        self.rows = [{"row": i, "features": features[i], "actions": actions[i]} for i in range(5)]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=2, shuffle=self.shuffle)

    def state_dict(self) -> dict[str, Any]:
        return {"pages": self.pages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pages = state_dict["pages"]


class Spy(L.Callback):
    """A plain Lightning callback that keeps what it sees at one hook.

    Args:
        hook: Its name.
        look: Makes what is kept out of the module and the hook's arguments.
    """

    def __init__(self, hook: str, look: Callable[..., Any]) -> None:
        self.seen: list[Any] = []
        setattr(self, hook, lambda trainer, pl_module, *args: self.seen.append(look(pl_module, *args)))


TENSORBOARD = ("add_text", "add_histogram", "add_custom_scalars", "add_figure")


def drawn(figure: Any) -> dict[str, list[list[float]]]:
    """What a figure shows in its first axes: the points of each line, dot and outline by its label."""
    axes = figure.axes[0]
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    points |= {dots.get_label(): dots.get_offsets().tolist() for dots in axes.collections}
    return points | {outline.get_label(): outline.get_xy().tolist() for outline in axes.patches}


class Recorder(Logger):
    """Keeps everything that it is given to log, and is its own TensorBoard: (kind, tag, value, step) each.

    Args:
        folder: The run's.
        kinds: What else than numbers it takes.
    """

    name, version = "recorder", 0

    def __init__(self, folder: Path, kinds: Sequence[str] = TENSORBOARD) -> None:
        super().__init__()
        self.folder, self.kinds = folder, kinds
        self.calls: list[tuple[str, str, Any, int | None]] = []

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(**{kind: partial(self.take, kind) for kind in self.kinds})

    def take(self, kind: str, tag: Any, value: Any = None, step: int | None = None) -> None:
        plain = drawn(value) if kind == "add_figure" else value.tolist() if isinstance(value, Tensor) else value
        self.calls.append((kind, tag, plain, step))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls += [("scalar", tag, value, step) for tag, value in metrics.items() if tag != "epoch"]

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        if args or kwargs:
            self.calls.append(("hparams", str(params), [*args, kwargs], None))

    def of(self, kind: str) -> list[tuple[str, Any, int | None]]:
        """What was logged of a kind: (tag, value, step)."""
        return [(tag, value, step) for one, tag, value, step in self.calls if one == kind]


class Attach(L.Callback):
    """Gives the trainer a logger that takes everything, and writes on the first process what it was given."""

    def __init__(self, folder: Path) -> None:
        self.logger, self.file = Recorder(folder), folder / "recorded.pt"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.loggers = [*trainer.loggers, self.logger]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            torch.save(self.logger.calls, self.file)


def trainer_of(callbacks: Sequence[L.Callback], updates: int, logger: Logger | None = None) -> L.Trainer:
    """A trainer that prints nothing, and writes nothing without a logger."""
    return make_trainer(Path(), max_steps=-1, max_epochs=updates, callbacks=[*callbacks], logger=logger or False)


def run_updates(
    callbacks: L.Callback | Sequence[L.Callback],
    updates: int = 1,
    *,
    module: L.LightningModule | None = None,
    resume: Path | None = None,
    save: Path | None = None,
    logger: Logger | None = None,
    **toy: Any,
) -> Any:
    """Train the toy for some updates and give it back.

    Args:
        callbacks: One, or a list.
        updates: Up to which update, those before ``resume`` included.
        module: Another module in the toy's place.
        resume: Checkpoint to go on from.
        save: Where to write a checkpoint at the end.
        logger: Where to log.
        **toy: Arguments of :class:`Toy`.
    """
    module = Toy(**toy) if module is None else module
    data = ToyData(module.episodes) if isinstance(module, Toy) else None
    trainer = trainer_of([callbacks] if isinstance(callbacks, L.Callback) else callbacks, updates, logger)
    with warnings.catch_warnings():  # Lightning's advice on workers, and on a toy's few batches
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*GPU available but not used.*")
        trainer.fit(module, datamodule=data, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return module


def scores_after(callbacks: Any, *batches: Sequence[float]) -> tuple[list[list[float]], dict[str, float]]:
    """What callbacks make of the scores of each update, and what is logged of the last one.

    Asserts that raw scores stay and that token rewards, without a KL penalty, are the scores that the callbacks left.
    """
    module = run_updates(
        callbacks, len(batches), episodes=len(batches[0]), kl_coef=0.0, scores=lambda update: batches[update]
    )
    for experience, batch in zip(module.experiences, batches, strict=True):
        assert torch.equal(experience.raw_scores, torch.tensor(batch))
        assert torch.equal(experience.rewards.sum(1), experience.scores)
    logged = {name: value.item() for name, value in module.trainer.logged_metrics.items()}
    return [experience.scores.tolist() for experience in module.experiences], logged
