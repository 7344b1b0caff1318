"""The hook contract: when each hook is called, what it is given, and what callbacks may use of the module.

One update, with every hook in its place::

    on_rollout_start(prompts)
    experience = rollout(prompts)
    on_rollout_end(experience)
    experience.scores = score(experience)
    on_scores(experience)
    experience.rewards = token_rewards(experience)
    on_rewards(experience)
    experience.advantages, experience.returns = advantages(experience)
    on_advantages(experience)
    for minibatch in experience.minibatches(...):
        on_minibatch_start(minibatch)
        for micro_batch in minibatch:
            on_actor_loss(micro_batch, {"policy": ...}); backward of the sum
        for micro_batch in minibatch:
            on_critic_loss(micro_batch, {"value": ...}); backward of the sum
        on_minibatch_end(experience, metrics)
        step of the optimizers, unless experience.exhausted
    on_update_end(experience)

In a loop of the user's own, ``rollout`` calls the first two, and ``step`` all others.

:func:`fire` calls a hook by name on every callback of the trainer that has it, so plain Lightning callbacks and other
people's modules work too. It refuses what would leave a callback without effect; see ``docs/own_module.md``.
"""

from collections.abc import Sized
from typing import Any, ClassVar, Protocol

import lightning as L
import torch
from torch import Tensor

from lit_ppo.callbacks.hooks import HOOKS, Fired, check_hooks, fire, refuse_ignored_end
from lit_ppo.functional import ClipRange

__all__ = ["HOOKS", "ExperienceLike", "MinibatchLike", "PPOCallback", "PPOModule", "fire"]


class ExperienceLike(Protocol):
    """What flows through an update. Callbacks rebind fields; tensors are not edited in place.

    Shapes: ``group`` (samples of one prompt share it), ``prompt_index``, ``raw_scores``, ``scores``, ``ended`` (B,);
    the other tensors (B, T), 0 where masked.
    """

    group: Tensor
    prompt_index: Tensor
    response_ids: Tensor
    response_mask: Tensor
    ended: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    values: Tensor | None
    kl: Tensor
    raw_scores: Tensor
    scores: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor | None
    exhausted: bool
    extras: dict[str, Any]

    def keep(self, rows: Tensor) -> None:
        """Cut to some rows in place; possible until ``on_scores``."""
        ...


class MinibatchLike(ExperienceLike, Protocol):
    """The rows of one optimizer step, or one micro-batch of them with what the models just computed.

    ``new_logprobs``, ``new_entropy``, ``new_values`` are (B, T) and differentiable in the hook of their own loss.
    """

    new_logprobs: Tensor
    new_entropy: Tensor
    new_values: Tensor

    def mean(self, x: Tensor) -> Tensor:
        """The mean that the module's ``loss_reduction`` asks for, taken over the whole optimizer step."""
        ...

    def log(self, name: str, x: Tensor) -> None:
        """Add the mean of ``x`` (B, T) over all response tokens of this step to its metrics."""
        ...


class PPOModule(Protocol):
    """What callbacks may read, write and call on the module. Each trick checks what it needs with :func:`require`."""

    trainer: L.Trainer
    kl_coef: float
    kl_estimator: str
    clip_range: ClipRange | None
    ppo_epochs: int
    samples_per_prompt: int
    actor_frozen: bool
    critic_frozen: bool
    n_critic_states: int  # numbers of the critic's hidden states that training rollouts leave in ``extras``
    n_actions: int  # other tokens at each place that training rollouts leave there, with what follows from them
    checkpoint_reference: bool
    actor: Any
    critic: Any
    reference: Any
    tokenizer: Any
    actor_optimizer: Any

    def rollout(self, prompts: Any, **kwargs: Any) -> Any:
        """Sample responses; fires no hooks."""
        ...

    def score(self, experience: Any) -> Tensor:
        """(B,) scores; fires no hooks."""
        ...

    def exact_kl(self, minibatch: Any) -> Tensor:
        """(B, T) KL over the vocabulary, differentiable."""
        ...

    def backward_on_text(self, batch: Any, coef: float) -> tuple[float, float]:
        """Backward of ``coef`` times the next-token loss on text, the same on every rank: its loss, its gradient norm.

        The batch is what the data module's collation made, on the host.
        """
        ...

    def loss_on_text(self, batch: Any) -> tuple[float, int]:
        """The actor's next-token loss on text, the same on every rank, and the tokens it is a mean of; no gradients."""
        ...

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's."""
        ...


class PPOCallback(L.Callback):
    """Base of the tricks: every hook as a typed no-op.

    A subclass that defines an ``on_...`` method which nothing fires is refused: it is a misspelt hook. ``reads`` are
    the fields of experience and minibatch that a subclass reads; their shapes and kinds are checked before each call.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse hooks that nothing fires.

        Raises:
            TypeError: An ``on_...`` method is neither one of ours nor one of Lightning's.
        """
        super().__init_subclass__(**kwargs)
        for name in vars(cls):
            if name.startswith("on_") and not hasattr(PPOCallback, name):
                raise TypeError(f"{cls.__name__}.{name}: nothing fires this hook; ours are {', '.join(HOOKS)}")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the logging methods that Lightning binds to callbacks: they would drag the module along."""
        return {name: value for name, value in vars(self).items() if name not in ("log", "log_dict")}

    def waits_for(self, pl_module: Any) -> set[str]:
        """The hooks without which the callback does not work; by default all that it overrides."""
        return {hook for hook in HOOKS if getattr(type(self), hook) is not getattr(PPOCallback, hook)}

    def restore(self, pl_module: Any) -> None:
        """Undo what the callback has set on the module, and forget an unfinished update.

        It is called when a fit has ended or failed, since a later one may be without the callback. It may be called
        twice, or before the callback has set anything.
        """

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the module."""
        self.restore(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the module, since Lightning then calls no ``teardown``."""
        self.restore(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a module that fires no hooks, on which the trick would silently do nothing.

        Raises:
            TypeError: Naming both.
        """
        if not hasattr(pl_module, "_fired"):
            raise TypeError(
                f"{type(self).__name__} waits for hooks that {type(pl_module).__name__} never fires; "
                "call lit_ppo.callbacks.fire in its training_step, or remove the callback"
            )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Refuse a step of an update that a callback has ended."""
        refuse_ignored_end(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a module whose only update had no end."""
        fired: Fired = getattr(pl_module, "_fired", Fired())
        if fired.now and "on_update_end" not in fired.ever and trainer.global_step > fired.step:
            check_hooks(trainer, pl_module)

    def on_rollout_start(self, trainer: L.Trainer, pl_module: PPOModule, prompts: Sized) -> None:
        """Before sampling; may set the module's contract attributes."""

    def on_rollout_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """Responses, masks, log-probs, reference log-probs, KL and values are there."""

    def on_scores(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """``raw_scores`` and ``scores`` are there."""

    def on_rewards(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """``rewards`` are there: score at the last token, less ``kl_coef`` x KL at every token."""

    def on_advantages(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """``advantages`` and ``returns`` are there."""

    def on_minibatch_start(self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike) -> None:
        """Once per optimizer step, gradients zeroed, nothing run yet; the global minibatch."""

    def on_actor_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        """Per micro-batch, empty ones included: the named losses whose sum is back-propagated into the actor.

        All micro-batches of a step come first here, then all of them in ``on_critic_loss``.
        """

    def on_critic_loss(
        self, trainer: L.Trainer, pl_module: PPOModule, minibatch: MinibatchLike, losses: dict[str, Tensor]
    ) -> None:
        """The same for the critic. ``new_logprobs`` and ``new_entropy`` have no gradient here."""

    def on_minibatch_end(
        self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike, metrics: dict[str, float]
    ) -> None:
        """Gradients complete, optimizers not yet stepped; ``experience.exhausted = True`` cancels the step."""

    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        """All optimizer steps of the update are done."""
