"""Optimizer steps under Lightning's manual optimization: accumulate, clip, skip, step, count."""

import math
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_ppo.experience import Experience, Minibatch, model_inputs
from lit_ppo.parallel.ranks import n_ranks, rank, sum_over_ranks
from lit_ppo.parallel.sharding import clip_gradients, total_norm, without_gradient_sync
from lit_ppo.ppo.collect import Policy
from lit_ppo.ppo.metrics import LOSS_NAMES, SKIPPED, failure_facts, of_experience, of_steps, peak_memory

T = TypeVar("T")
_GROUPS = {"actor": "policy", "critic": "value"}
ON_THE_BAR = ("objective/score", "objective/kl", "response/length", "throughput/tokens_per_second")
_POSITIONS = "max_position_embeddings"


class NonFiniteError(RuntimeError):
    """Losses or gradients stopped being finite."""


class OptimizerSteps(Policy):
    """What LitPPO's update needs of optimizers, between a minibatch and the next."""

    actor_frozen: bool
    _actor_rests: bool  # in this update
    max_grad_norm: float | None
    max_skipped_steps: int
    skipped_steps: int  # in a row

    @property
    def actor_optimizer(self) -> Optimizer:
        """The actor's."""
        return self._optimizers()["actor"]

    @property
    def critic_optimizer(self) -> Optimizer:
        """The critic's."""
        return self._optimizers()["critic"]

    def _optimizers(self) -> dict[str, Optimizer]:
        optimizers = self.optimizers(use_pl_optimizer=False)
        listed = optimizers if isinstance(optimizers, list) else [optimizers]
        return dict(zip(("actor", "critic"), listed, strict=False))

    def zero_gradients(self) -> None:
        """Forget the gradients, and who has any."""
        self._with_gradients: set[str] = set()
        for optimizer in self._optimizers().values():
            optimizer.zero_grad(set_to_none=True)

    def micro_batches(self, minibatch: Minibatch) -> Iterator[Minibatch]:
        """This rank's micro-batches of the global minibatch."""
        plan = self.plan([sum(both) for both in minibatch.lengths])
        return minibatch.micro_batches(plan[rank()], n_ranks())

    def accumulated(self, batches: Iterable[T]) -> Iterator[T]:
        """One after the other; only in the backwards of the last do ranks exchange gradients."""
        iterator = iter(batches)
        batch = next(iterator)
        for following in iterator:
            with without_gradient_sync(self.trainer.strategy):
                yield batch
            batch = following
        yield batch

    def backward_losses(self, model: str, micro: Minibatch, losses: dict[str, Tensor]) -> None:
        """Backward of the sum; no losses, no backward and no step."""
        for name, loss in losses.items():
            micro.log_part(LOSS_NAMES.get(name, f"{_GROUPS[model]}/{name}_loss"), loss)
        if losses:
            self.manual_backward(torch.stack(list(losses.values())).sum())
            self._with_gradients.add(model)

    def gather_metrics(self, minibatch: Minibatch) -> dict[str, float]:
        """The step's metrics over all ranks, and the gradient norms (before clipping)."""
        norms = {}
        for name in sorted(self._with_gradients):
            norms[f"{name}_grad_norm"] = clip_gradients(getattr(self, name), self.max_grad_norm)
        # whether all are finite is asked of all ranks: one alone that skips, or steps, would part from the others
        broken = {f"{name} broken": ~norm.isfinite() for name, norm in norms.items()}
        metrics = sum_over_ranks(
            minibatch.metrics | broken, least=minibatch.least, greatest=minibatch.greatest, alike=norms
        )
        for name in norms:
            if metrics.pop(f"{name} broken"):
                metrics[name] = math.nan
        return metrics

    def step_optimizers(self, metrics: dict[str, float], experience: Experience) -> None:
        """Step whoever has gradients, or skip and count where a loss or gradient is not finite.

        Raises:
            NonFiniteError: More than ``max_skipped_steps`` in a row were skipped.
        """
        checked = {name: value for name, value in metrics.items() if name.endswith(("loss", "grad_norm"))}
        skipped = not all(map(math.isfinite, checked.values()))
        metrics[SKIPPED] = float(skipped)
        if skipped:
            self.skipped_steps += 1
            if self.skipped_steps > self.max_skipped_steps:
                raise NonFiniteError(failure_facts(self, checked, experience))
            return
        self.skipped_steps = 0
        for name, optimizer in self._optimizers().items():
            if name in self._with_gradients:
                # not through LightningOptimizer, which would count every one of them as a global step
                self.trainer.strategy.optimizer_step(optimizer, closure=lambda: None)

    def end_update(self) -> None:
        """Step the schedules and count one global step: one update, whatever was stepped or skipped in it."""
        schedulers = self.lr_schedulers() or []
        frozen = self.actor_optimizer if self._actor_rests else None
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if scheduler.optimizer is not frozen:
                scheduler.step()  # type: ignore[call-arg]
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()

    def backward_on_text(self, batch: dict[str, Tensor], coef: float) -> tuple[float, float]:
        """Add the gradient of ``coef`` times the next-token loss on a text batch, the same one on every rank.

        The actor steps where PPO's own losses make it step. Called before them, it keeps no second set of gradients.

        Args:
            batch: ``input_ids``, ``attention_mask`` and ``labels`` (-100 where there is nothing to predict), (B, L).
            coef: Weight of the loss.

        Returns:
            The loss, a mean over tokens, without ``coef``; and the norm of the gradient added, over all ranks.

        Raises:
            ValueError: The labels are not the ids of the same place, or a text is beyond the actor's positions.
        """
        batch, targets, n_tokens = self._text(batch)
        before = {p: p.grad.clone() for p in self.actor.parameters() if p.grad is not None}
        total = torch.zeros((), device=self.device)
        for rows in self.accumulated(self.plan(batch["attention_mask"].sum(1).tolist())[rank()]):
            loss = self._text_loss(batch, targets, rows) / n_tokens
            self.manual_backward(coef * n_ranks() * loss)
            total += loss.detach()
        added = [p.grad - before[p] if p in before else p.grad for p in self.actor.parameters() if p.grad is not None]
        return sum_over_ranks({"loss": total})["loss"], float(total_norm(added))

    @torch.no_grad()
    def loss_on_text(self, batch: dict[str, Tensor]) -> tuple[float, int]:
        """The actor's next-token loss on a text batch, the same one on every rank; leaves no gradients.

        Args:
            batch: As :meth:`backward_on_text` takes it.

        Returns:
            The loss over all ranks, a mean over tokens, and their number.

        Raises:
            ValueError: As there.
        """
        batch, targets, n_tokens = self._text(batch)
        parts = [
            self._text_loss(batch, targets, rows) for rows in self.plan(batch["attention_mask"].sum(1).tolist())[rank()]
        ]
        return sum_over_ranks({"loss": torch.stack(parts).sum()})["loss"] / n_tokens, n_tokens

    def _text(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, int]:
        """The batch on the host, which tokens are predicted, and how many."""
        batch = {name: tensor.cpu() for name, tensor in batch.items()}
        targets = text_targets(batch, getattr(self.actor.model.config.get_text_config(), _POSITIONS, None))
        return batch, targets, max(1, int(targets.sum()))

    def _text_loss(self, batch: dict[str, Tensor], targets: Tensor, rows: list[int]) -> Tensor:
        """Sum over the tokens of some rows; none of them is a row of no weight, so that every rank runs a forward."""
        part = {name: tensor[rows or [0]] for name, tensor in batch.items()}
        ids, target_mask = part["input_ids"].to(self.device), targets[rows or [0]]
        logprobs: Tensor = self.actor(ids, part["attention_mask"].bool(), target_mask=target_mask)[0]
        return -logprobs.sum() * bool(rows)

    def exact_kl(self, minibatch: Minibatch) -> Tensor:
        """KL to the reference over the whole vocabulary, per token and differentiable.

        Shapes:
            -> (B, T).
        """
        if self.reference is None:
            raise ValueError("exact_kl: there is no reference; give LitPPO one")
        ids, mask, target_mask = model_inputs(minibatch)
        with torch.no_grad():
            head = self.reference(ids, mask, target_mask=target_mask, head_inputs=True)
        return self.actor_forward(self.actor, minibatch, kl_to=head)[1]

    def log_update(self, experience: Experience, coefficients: dict[str, float], steps: list[dict[str, float]]) -> None:
        """Log once an update; optimizer steps are averaged.

        Args:
            experience: The update's.
            coefficients: What was in force.
            steps: Metrics of each optimizer step.
        """
        seconds = sum(self.seconds.values())
        metrics = {
            **coefficients,
            **of_experience(experience, coefficients["objective/kl_coef"]),
            **of_steps(steps),
            **{f"time/{phase}": value for phase, value in self.seconds.items()},
            **{f"time/share/{phase}": value / seconds for phase, value in self.seconds.items()},
            "throughput/tokens_per_second": int(experience.response_mask.sum()) / seconds,
        }
        peak = peak_memory(self.device)
        if peak is not None:
            metrics["memory/peak_gib"] = peak / 2**30
        if self.sampling_difference is not None:
            metrics["rollout/sampling_logprob_difference"] = self.sampling_difference
        for name in self.source_names:
            metrics[f"objective/score/{name}"] = float(experience.extras[name].mean())
        for name, value in metrics.items():
            self.log(name, value, prog_bar=name in ON_THE_BAR, batch_size=1)
        self.seconds.clear()


def text_targets(batch: dict[str, Tensor], limit: int | None) -> Tensor:
    """Which tokens of a text batch are predicted: those with a label and another token before them.

    Args:
        batch: See :meth:`OptimizerSteps.backward_on_text`.
        limit: Tokens that the model has positions for.

    Raises:
        ValueError: See there.

    Shapes:
        -> (B, L), boolean.
    """
    real = batch["attention_mask"].bool()
    longest = int(real.sum(1).max())
    if limit is not None and longest > limit:
        raise ValueError(
            f"backward_on_text: a text of {longest} tokens is beyond the actor's {limit} positions; lower the data's "
            "max_length"
        )
    targets = (batch["labels"] != -100) & real & (real.cumsum(1) > 1)
    if (batch["labels"] != batch["input_ids"])[targets].any():
        raise ValueError(
            "backward_on_text: labels must be input_ids, or -100 where there is nothing to predict; they are not to "
            "be shifted"
        )
    return targets
