"""The forwards of training, and optimizer steps under Lightning's manual optimization: accumulate, clip, skip, step."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_ppo.callbacks.base import fire
from lit_ppo.device import exact_device
from lit_ppo.experience import Experience, Minibatch, ModelInputs
from lit_ppo.functional import kl_estimate, policy_loss, value_loss
from lit_ppo.models.actor_critic import actor_forward, critic_forward, read_values
from lit_ppo.optim.settings import BuiltOptimizer
from lit_ppo.parallel.ranks import deal, map_forwards, my_micro_batches, n_ranks, sum_over_ranks
from lit_ppo.parallel.sharding import without_gradient_sync
from lit_ppo.ppo.metrics import LOSS_NAMES, SKIPPED, describe_failure, log_policy
from lit_ppo.ppo.settings import Models
from lit_ppo.validate import integer, positive_or_none

T = TypeVar("T")


class NonFiniteError(RuntimeError):
    """Losses or gradients stopped being finite."""


class Optimization:
    """Gradients and optimizer steps of actor and critic, and what a resume needs of them.

    Args:
        owner: The LitPPO, for messages.
        max_grad_norm: Of actor and critic each; None: no clipping.
        max_skipped_steps: Consecutive steps that may be skipped because a loss or gradient is not finite.
    """

    def __init__(self, owner: object, max_grad_norm: float | None, max_skipped_steps: int) -> None:
        self.max_grad_norm = positive_or_none(owner, "max_grad_norm", max_grad_norm)
        self.max_skipped_steps = integer(owner, "max_skipped_steps", max_skipped_steps, at_least=0)
        self.skipped_steps = 0  # in a row
        self.trained = {"actor", "critic"}  # in the current update
        self.updates = {"actor": 0, "critic": 0}  # in which each was trained: the steps of their schedules
        self.with_gradients: set[str] = set()  # in the current step
        self.built: dict[str, BuiltOptimizer] = {}
        self.resumed: tuple[dict[str, Any], list[Any]] | None = None  # settings and states, until training starts

    def zero_gradients(self, module: Any) -> None:
        """Start a step without gradients."""
        self.with_gradients.clear()
        for optimizer in optimizers_of(module).values():
            optimizer.zero_grad(set_to_none=True)

    def clip(self, module: Any, minibatch: Minibatch) -> dict[str, float]:
        """Clip the gradients once they are complete.

        Returns:
            The step's metrics over all ranks, with the gradient norms before clipping.
        """
        norms = {
            f"{name}_grad_norm": clip_gradients(getattr(module, name), self.max_grad_norm)
            for name in sorted(self.with_gradients)
        }
        # all ranks decide together whether the norms are finite: one that skips alone would diverge from the others
        broken = {f"{name} broken": ~norm.isfinite() for name, norm in norms.items()}
        metrics = sum_over_ranks(
            minibatch.metrics | broken, least=minibatch.least, greatest=minibatch.greatest, alike=norms
        )
        for name in norms:
            if metrics.pop(f"{name} broken"):
                metrics[name] = math.nan
        return metrics

    def step(self, module: Any, metrics: dict[str, float], experience: Experience) -> None:
        """Step the optimizers that have gradients, or skip the step where a loss or gradient is not finite.

        Args:
            module: The LitPPO.
            metrics: From :meth:`clip`; gets the share of skipped steps, 0 or 1.
            experience: The update's, for the error.

        Raises:
            NonFiniteError: More than ``max_skipped_steps`` in a row were skipped.
        """
        checked = {name: value for name, value in metrics.items() if name.endswith(("loss", "grad_norm"))}
        skipped = not all(map(math.isfinite, checked.values()))
        metrics[SKIPPED] = float(skipped)
        if skipped:
            self.skipped_steps += 1
            if self.skipped_steps > self.max_skipped_steps:
                raise NonFiniteError(
                    f"update {module.rollouts}: {describe_failure(checked, experience)}; {self.skipped_steps} "
                    f"optimizer steps in a row (max_skipped_steps={self.max_skipped_steps}); the last "
                    "checkpoint is unharmed: lower the learning rate or max_grad_norm, or check the reward"
                )
            return
        self.skipped_steps = 0
        # not in autocast: an optimizer with matrix products of its own (Shampoo, SOAP) needs all bits of them
        with torch.autocast(module.device.type, enabled=False):
            for name, optimizer in optimizers_of(module).items():
                if name in self.with_gradients:
                    # not through LightningOptimizer, which would count each step as a global step
                    module.trainer.strategy.optimizer_step(optimizer, closure=lambda: None)

    def end_update(self, module: Any) -> None:
        """Step the schedules and count one global step, whether or not optimizers were stepped; free all gradients."""
        self.zero_gradients(module)  # rollout and scoring need the memory
        self.updates |= {name: self.updates[name] + 1 for name in self.trained}
        schedulers = module.lr_schedulers() or []
        resting = [optimizer for name, optimizer in optimizers_of(module).items() if name not in self.trained]
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
            if scheduler.optimizer not in resting:
                scheduler.step()
        progress = module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()


def add_logprobs(
    module: Any, models: Models, experience: Experience, sampled: Tensor | None = None, *, trains: bool = False
) -> None:
    """Set log-probs of actor and reference, KL and values, with the forwards that training uses.

    Args:
        module: The LitPPO. Gets the difference between log-probs of sampling and of training, where it is measured.
        models: Its actor, reference and critic.
        experience: Sampled by the actor.
        sampled: Log-probs of sampling, (B, T), kept if they differ from the training pass by at most
            ``sampling_logprobs_tolerance`` on one micro-batch per rank; None: always run the training pass.
        trains: Add what the module's ``n_actions`` and ``n_critic_states`` ask for to ``extras``.
    """
    n_actions, n_states = (module.n_actions, module.n_critic_states) if trains else (0, 0)
    options, limits = {"temperature": module.temperature, "entropy": False}, module.limits
    shape, draws = (*experience.response_ids.shape, n_actions), None
    if n_actions:
        sampled = None  # the training pass samples the other tokens
        draws = torch.from_numpy(np.random.default_rng([module.seed, module.rollouts, n_actions]).random(shape))

    def train(inputs: ModelInputs, rows: Sequence[int]) -> dict[str, Tensor]:
        ids, mask, target_mask = inputs
        own = None if draws is None else draws[rows, : target_mask.shape[1]].to(exact_device(ids.device))
        tokens, logprobs = models.actor(ids, mask, target_mask=target_mask, draws=own, **options)
        actions = {"action_ids": tokens, "action_logprobs": logprobs} if n_actions else {}
        return {"logprobs": logprobs[..., 0]} | actions

    lengths = [n_prompt + n_response for n_prompt, n_response in experience.lengths]
    if sampled is not None and module.tolerance is not None:
        first = [row for micro_batches in deal(lengths, n_ranks(), **limits) for row in micro_batches[0]]
        trained = map_forwards(train, experience.select(first), [lengths[row] for row in first], limits)["logprobs"]
        module.sampling_difference = float((trained - sampled[first]).abs().max())
        sampled = sampled if module.sampling_difference <= module.tolerance else None

    def compute(inputs: ModelInputs, rows: Sequence[int]) -> dict[str, Tensor]:
        ids, mask, target_mask = inputs
        computed = train(inputs, rows) if sampled is None else {}
        others = computed["action_ids"][..., 1:] if n_actions else None
        if models.reference is not None:
            found = models.reference(ids, mask, target_mask=target_mask, actions=others, **options)[1]
            computed |= {"ref_logprobs": found[..., 0]} | ({"action_ref_logprobs": found} if n_actions else {})
        if models.critic is not None:
            computed |= read_values(models.critic, inputs, n_states, others, models.generation)
        return computed

    computed = map_forwards(compute, experience, lengths, limits)
    experience.logprobs = computed.pop("logprobs") if sampled is None else sampled
    experience.ref_logprobs, experience.values = computed.pop("ref_logprobs", None), computed.pop("values", None)
    experience.extras |= computed
    if experience.ref_logprobs is None:
        experience.kl = torch.zeros_like(experience.logprobs)
    else:
        experience.kl = kl_estimate(experience.logprobs, experience.ref_logprobs, module.kl_estimator)


def backward_minibatch(module: Any, minibatch: Minibatch) -> dict[str, float]:
    """Gradients of one optimizer step, accumulated over micro-batches and clipped.

    All micro-batches go through the actor, then all through the critic: where models are sharded, a rank then holds
    the full gradients of one of them only.

    Args:
        module: The LitPPO.
        minibatch: The rows of all ranks.

    Returns:
        The step's metrics over all ranks.
    """
    optimization: Optimization = module.optimization
    optimization.zero_gradients(module)
    fire(module, "on_minibatch_start", minibatch)
    lengths = [n_prompt + n_response for n_prompt, n_response in minibatch.lengths]
    plan = my_micro_batches(lengths, **module.limits)
    micro_batches = list(minibatch.micro_batches(plan, module.trainer.world_size))
    if "actor" in optimization.trained:
        for micro in accumulate(micro_batches, module.trainer.strategy):
            _backward_actor(module, micro)
    if module.critic is not None and "critic" in optimization.trained:
        for micro in accumulate(micro_batches, module.trainer.strategy):
            _backward_critic(module, micro)
    return optimization.clip(module, minibatch)


def step_optimizers(module: Any, metrics: dict[str, float], experience: Experience) -> None:
    """Step the optimizers that have gradients, or skip the step where a loss or gradient is not finite."""
    module.optimization.step(module, metrics, experience)
    if module.sampler is not None:
        module.sampler.is_stale = True


def _backward_actor(module: Any, micro: Minibatch) -> None:
    inputs, n_columns, actions = micro.model_inputs(), micro.response_ids.shape[1], micro.extras.get("action_ids")
    others = None if actions is None else actions[:, : inputs.target_mask.shape[1], 1:]
    found, micro.new_entropy = actor_forward(module.actor, inputs, n_columns, module.temperature, actions=others)
    micro.new_logprobs = found if actions is None else found[..., 0]
    if actions is not None:
        micro.extras["new_action_logprobs"] = found
    log_policy(micro, module.clip_range)
    loss = policy_loss(micro.new_logprobs, micro.logprobs, micro.advantages, module.clip_range)
    losses = {"policy": micro.mean(loss)}
    fire(module, "on_actor_loss", micro, losses)
    _backward(module, "actor", micro, losses)
    # the critic's turn comes later: nothing may keep the actor's activations until then
    micro.new_logprobs, micro.new_entropy = micro.new_logprobs.detach(), micro.new_entropy.detach()
    micro.extras.pop("new_action_logprobs", None)


def _backward_critic(module: Any, micro: Minibatch) -> None:
    if micro.returns is None:
        raise ValueError(f"LitPPO(advantages={module.advantages!r}): gives no returns for the critic to learn")
    micro.new_values = critic_forward(module.critic, micro.model_inputs(), micro.response_ids.shape[1])
    losses = {"value": micro.mean(value_loss(micro.new_values, micro.returns))}
    fire(module, "on_critic_loss", micro, losses)
    _backward(module, "critic", micro, losses)
    micro.new_values = micro.new_values.detach()


def _backward(module: Any, name: str, micro: Minibatch, losses: dict[str, Tensor]) -> None:
    """Log the losses and back-propagate their sum; without losses there is no backward and no step."""
    group = {"actor": "policy", "critic": "value"}[name]
    micro.log_parts({LOSS_NAMES.get(key, f"{group}/{key}_loss"): loss for key, loss in losses.items()})
    if losses:
        module.manual_backward(torch.stack(list(losses.values())).sum())
        module.optimization.with_gradients.add(name)


def optimizers_of(module: Any) -> dict[str, Optimizer]:
    """The Trainer's optimizers of actor and critic."""
    optimizers = module.optimizers(use_pl_optimizer=False)
    return dict(zip(("actor", "critic"), optimizers if isinstance(optimizers, list) else [optimizers], strict=False))


def actor_optimizer(module: Any) -> Optimizer:
    """The actor's optimizer."""
    return optimizers_of(module)["actor"]


def accumulate(batches: Iterable[T], strategy: Any) -> Iterator[T]:
    """One batch after the other; ranks exchange gradients only in the backwards of the last.

    Args:
        batches: At least one.
        strategy: The Trainer's.
    """
    iterator = iter(batches)
    batch = next(iterator)
    for following in iterator:
        with without_gradient_sync(strategy) if n_ranks() > 1 else nullcontext():
            yield batch
        batch = following
    yield batch


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale a model's gradients down to a norm if they exceed it; returns the norm before, over all ranks."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Norm over all ranks of a model's gradients, or of tensors sharded like them."""
    if any(x.dtype is torch.bfloat16 for x in tensors):  # sums of squares need more than its 8 bits
        tensors = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in tensors]
    norm = nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
