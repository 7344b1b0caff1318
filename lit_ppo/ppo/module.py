"""LitPPO: proximal policy optimization of a language model, from a reward."""

import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_ppo.advantages import GAE, AdvantageEstimator
from lit_ppo.callbacks.base import fire
from lit_ppo.experience import Experience, LossReduction, Minibatch
from lit_ppo.functional import KLEstimator, policy_loss, token_rewards, value_loss
from lit_ppo.parallel.checkpoint_io import use_atomic_checkpoints
from lit_ppo.parallel.sharding import shards
from lit_ppo.parallel.strategies import refuse_fsdp1
from lit_ppo.ppo.build import Assembly
from lit_ppo.ppo.checks import ReferenceDtype, check_arguments, check_estimator
from lit_ppo.ppo.evaluate import Evaluation
from lit_ppo.ppo.metrics import forget_last_update, in_force, log_policy
from lit_ppo.ppo.optimize import OptimizerSteps
from lit_ppo.ppo.preflight import check_batch, preflight
from lit_ppo.rewards import Rewards, ScoreSource, as_source, eval_sources


class LitPPO(Assembly, Evaluation, OptimizerSteps):
    """Trains a causal language model to raise a score, by PPO.

    ``training_step`` is one update: sample responses, score them, turn scores into token rewards and advantages,
    then take ``ppo_epochs`` passes of optimizer steps over them. ``collect`` and ``update`` fire the hooks of
    ``lit_ppo.callbacks``; override ``collect`` or ``training_step`` for another loop. One global step is one update.

    Args:
        actor: Folder or hub name of the causal LM to train.
        tokenizer: Folder or hub name; by default the actor's own.
        critic: ``"actor"`` or ``"reward"`` (start from that model's weights), a path, or None with an estimator
            that needs no values.
        reference: ``"actor"`` (a frozen copy of where the run starts from), a path, or None: no KL term.
        reference_dtype: ``"bfloat16"`` halves the reference's memory and rounds its log-probs; the KL starts near 0
            then, not at 0.
        actor_lora: Fields of ``peft.LoraConfig``, such as ``{r: 16, target_modules: all-linear}``: an adapter is
            trained in place of the whole actor, and without it the actor is its own reference: no second copy.
            Checkpoints hold the adapter alone. Its rate is usually ten times that of whole models.
        critic_lora: The same for the critic; its value head is trained as a whole.
        rewards: A ``RewardModel``, a ``RewardFunction``, any callable ``(prompts, responses, **columns)``, or a dict
            of those by name, each plain or as ``{source: ..., weight: ...}``.
        eval_rewards: Score sources by name that judge in validation and test alone, each by a mean score and by how
            often it prefers the actor's response to the reference's.
        advantages: Estimator; of those in ``lit_ppo.advantages`` only ``GAE`` takes a critic.
        generation: Fields of ``transformers.GenerationConfig``; ``max_new_tokens`` is needed.
        temperature: Of sampling and of all log-probs.
        samples_per_prompt: Responses to each prompt; several where the estimator compares them.
        kl_coef: Weight of the KL to the reference in the token rewards.
        kl_estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        clip_range: Of the probability ratio; None is no clipping.
        ppo_epochs: Passes over the experience.
        minibatch_size: Responses in an optimizer step, over all ranks.
        micro_batch_size: Most responses in one forward of one rank (sampling takes a rank's whole share at once).
        micro_batch_tokens: Instead: most tokens in one forward, padding included.
        sampling_logprobs_tolerance: None: log-probs of a rollout are computed again by the training pass. A number:
            those of the sampling pass are kept where the training pass gives the same to within it on one micro-batch
            a rank, logged as ``rollout/sampling_logprob_difference``; saves about 3% of an update.
        loss_reduction: ``"token_mean"``, or ``"sequence_mean"``: over each response's tokens, then over responses.
        actor_optimizer: From parameters to optimizer. Its rate is usually a tenth of the cold start's.
        critic_optimizer: The same; its rate is usually about twice the actor's.
        actor_scheduler: From optimizer to schedule, one step an update.
        critic_scheduler: The same.
        max_grad_norm: Of actor and critic each; None is no clipping.
        max_skipped_steps: Optimizer steps in a row that may be skipped because loss or gradient is not finite; one
            more ends the run.
        activation_checkpointing: Keep only what goes into each block of actor and critic for the backward, and
            compute the rest again: far less memory, a third more time.
        compile_blocks: ``torch.compile`` the blocks of actor, reference and critic, for all but sampling; the first
            update then takes a minute longer.
        reward_timeout: Seconds that a rank's share of the scores may take; then the run ends with an error instead of
            waiting. None: no limit, but of several ranks the others give up after the process group's ``timeout``
            (an argument of the strategy).
        model_kwargs: For ``from_pretrained`` of actor, critic and reference, such as ``attn_implementation``. Code that
            comes with a model runs only with ``trust_remote_code: true``.
        seed: Of sampling and of minibatches; by default that of ``seed_everything``.

    Raises:
        ValueError: An argument, named with its value and what to do.
    """

    def __init__(
        self,
        actor: str,
        *,
        tokenizer: str | None = None,
        critic: str | None = "actor",
        reference: str | None = "actor",
        reference_dtype: ReferenceDtype = "float32",
        actor_lora: dict[str, Any] | None = None,
        critic_lora: dict[str, Any] | None = None,
        rewards: Rewards,
        eval_rewards: dict[str, ScoreSource] | None = None,
        advantages: AdvantageEstimator = GAE(),  # noqa: B008  # stateless
        generation: dict[str, Any],
        temperature: float = 1.0,
        samples_per_prompt: int = 1,
        kl_coef: float = 0.05,
        kl_estimator: KLEstimator = "k1",
        clip_range: float | None = 0.2,
        ppo_epochs: int = 4,
        minibatch_size: int = 32,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        sampling_logprobs_tolerance: float | None = None,
        loss_reduction: LossReduction = "token_mean",
        actor_optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=1e-6, weight_decay=0.0, fused=True
        ),
        critic_optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=2e-6, weight_decay=0.0, fused=True
        ),
        actor_scheduler: LRSchedulerCallable | None = None,
        critic_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        max_skipped_steps: int = 0,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
        reward_timeout: float | None = None,
        model_kwargs: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_arguments(type(self).__name__, given)
        self.save_hyperparameters(ignore=[name for name, value in given.items() if not _is_plain(value)])
        self.automatic_optimization = False
        self.strict_loading = False  # frozen weights stay out of checkpoints; on_load_checkpoint checks the rest
        self.paths = {"actor": actor, "tokenizer": tokenizer or actor, "critic": critic, "reference": reference}
        self.reference_dtype = reference_dtype
        self.lora = {"actor": actor_lora, "critic": critic_lora}
        self.rewards = as_source(rewards)
        self.eval_rewards = None if eval_rewards is None else eval_sources(self, self.rewards, eval_rewards)
        self.advantages = advantages
        self.generation_fields = dict(generation)
        self.temperature, self.samples_per_prompt = temperature, samples_per_prompt
        self.kl_coef, self.kl_estimator, self.clip_range = kl_coef, kl_estimator, clip_range
        self.ppo_epochs, self.minibatch_size = ppo_epochs, minibatch_size
        self.micro_batch_size, self.micro_batch_tokens = micro_batch_size, micro_batch_tokens
        self.sampling_logprobs_tolerance = sampling_logprobs_tolerance
        self.sampling_difference: float | None = None
        self.loss_reduction = loss_reduction
        self.factories: dict[str, tuple[OptimizerCallable, LRSchedulerCallable | None]] = {
            "actor": (actor_optimizer, actor_scheduler),
            "critic": (critic_optimizer, critic_scheduler),
        }
        self.max_grad_norm, self.max_skipped_steps = max_grad_norm, max_skipped_steps
        self.activation_checkpointing, self.compile_blocks = activation_checkpointing, compile_blocks
        self.reward_timeout = reward_timeout
        self.model_kwargs = dict(model_kwargs or {})
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.rollouts = self.skipped_steps = 0
        self.actor_frozen = self._actor_rests = self.checkpoint_reference = False
        self.phase, self.phase_since, self.phase_detail, self.seconds = "", None, "", {}
        self._means, self._reference_judged = {}, {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._built = False
        self._optimizers_built, self._resumed = {}, None

    # The arrow: prompts -> rollout -> scores -> token rewards -> advantages -> minibatch losses -> optimizer steps

    def training_step(self, prompts: Any, batch_idx: int) -> None:
        """One update."""
        self.update(self.collect(prompts))

    def collect(self, prompts: Any) -> Experience:
        """Sample responses to the prompts and score them; fires the hooks.

        Args:
            prompts: What :meth:`rollout` takes.
        """
        with self.timed("rollout"):
            fire(self, "on_rollout_start", prompts)
            check_estimator(type(self).__name__, self.advantages, self.samples_per_prompt, self.kl_coef)
            experience = self.rollout(prompts)
            fire(self, "on_rollout_end", experience)
        if not len(experience):
            raise ValueError("collect: callbacks have kept none of the rows; on_rollout_end must leave at least one")
        with self.timed("score"):
            experience.raw_scores = experience.scores = self.score(experience)
            fire(self, "on_scores", experience)
        return experience

    def update(self, experience: Experience) -> None:
        """Learn from scored experience; fires the hooks.

        Args:
            experience: What :meth:`collect` returned.
        """
        coefficients = in_force(self)
        steps: list[dict[str, float]] = []
        with self.timed("update"):
            experience.rewards = self.token_rewards(experience)
            fire(self, "on_rewards", experience)
            experience.advantages, experience.returns = self.advantages(experience)
            fire(self, "on_advantages", experience)
            self._actor_rests = self.actor_frozen  # a callback may lift it at the end of this update
            for minibatch in self.minibatches(experience):
                if experience.exhausted:
                    break
                self.phase_detail = f"step {len(steps) + 1}/{self._n_steps(experience)}"
                metrics = self.backward_minibatch(minibatch)
                fire(self, "on_minibatch_end", experience, metrics)
                if not experience.exhausted:
                    self.step_optimizers(metrics, experience)
                steps.append(metrics)
            fire(self, "on_update_end", experience)
            self.end_update()
        self.log_update(experience, coefficients, steps)

    def minibatches(self, experience: Experience) -> Iterator[Minibatch]:
        """``ppo_epochs`` permutations of all rows, cut into minibatches."""
        return experience.minibatches(
            self.minibatch_size, epochs=self.ppo_epochs, seed=(self.seed, self.rollouts), reduction=self.loss_reduction
        )

    def _n_steps(self, experience: Experience) -> int:
        return self.ppo_epochs * max(1, math.ceil(len(experience) / self.minibatch_size))

    def token_rewards(self, experience: Experience) -> Tensor:
        """The score at each response's last token, less ``kl_coef`` times the KL at every token.

        Shapes:
            -> (B, T).
        """
        return token_rewards(experience.scores, experience.kl, experience.response_mask, self.kl_coef)

    def backward_minibatch(self, minibatch: Minibatch) -> dict[str, float]:
        """Gradients of one optimizer step, accumulated over micro-batches and clipped.

        Returns:
            The step's metrics over all ranks, of what ran.
        """
        self.zero_gradients()
        fire(self, "on_minibatch_start", minibatch)
        for micro in self.accumulated(self.micro_batches(minibatch)):
            if not self._actor_rests:
                self.backward_actor(micro)
            if self.critic is not None:
                self.backward_critic(micro)
        return self.gather_metrics(minibatch)

    def backward_actor(self, micro: Minibatch) -> None:
        """The actor's losses on one micro-batch, and their backward."""
        micro.new_logprobs, micro.new_entropy = self.actor_forward(self.actor, micro)
        log_policy(micro, self.clip_range)
        loss = policy_loss(micro.new_logprobs, micro.logprobs, micro.advantages, self.clip_range)
        losses = {"policy": micro.mean(loss)}
        fire(self, "on_actor_loss", micro, losses)
        self.backward_losses("actor", micro, losses)

    def backward_critic(self, micro: Minibatch) -> None:
        """The critic's losses on one micro-batch, and their backward."""
        assert self.critic is not None
        if micro.returns is None:
            raise ValueError(f"LitPPO(advantages={self.advantages!r}): gives no returns for the critic to learn")
        micro.new_values = self.critic_forward(self.critic, micro)
        losses = {"value": micro.mean(value_loss(micro.new_values, micro.returns))}
        fire(self, "on_critic_loss", micro, losses)
        self.backward_losses("critic", micro, losses)

    # Before the first update

    def setup(self, stage: str) -> None:
        """Check what the trainer was asked for; callbacks have checked theirs just before."""
        # models are in eval mode for good: dropout is off in rollouts and updates alike
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        use_atomic_checkpoints(self.trainer)
        strategy = self.trainer.strategy
        # it comes where every step of the first update was skipped
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
        precision = self.trainer.precision
        if precision not in ("32-true", "64-true", "bf16-mixed"):
            raise ValueError(f"Trainer(precision={precision!r}): weights are kept in float32; use 'bf16-mixed'")
        if precision == "64-true" and self.reference_dtype != "float32":
            raise ValueError(
                f"LitPPO(reference_dtype={self.reference_dtype!r}): Trainer(precision='64-true') makes every model "
                "float64; use 'float32' or another precision"
            )
        refuse_fsdp1(strategy)
        if shards(strategy) and precision == "64-true":
            raise ValueError(f"Trainer(precision={precision!r}): models are sharded in float32; use '32-true'")
        if isinstance(strategy, DDPStrategy):
            # the actor's backward leaves the critic's parameters without gradients, and the other way round
            strategy._ddp_kwargs["find_unused_parameters"] = True

    def train(self, mode: bool = True) -> "LitPPO":
        """Frozen score sources stay in eval mode, as all our models do."""
        super().train(mode)
        for source in (self.rewards, self.eval_rewards):
            if isinstance(source, nn.Module):
                source.train(False)
        return self

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Forget what the last update logged; check the first batch's size, where no data module told it before."""
        forget_last_update(self.trainer)
        if self.trainer.global_step == 0:
            check_batch(self, len(batch))

    def on_fit_start(self) -> None:
        """Try what would fail later, before the first rollout."""
        with self.trainer.precision_plugin.forward_context():  # as steps run in, and Lightning's hooks do not
            preflight(self)

    def on_train_start(self) -> None:
        """Measure what training starts from."""
        super().on_train_start()
        self.validate_start()


def _is_plain(value: Any) -> bool:
    """Whether a value can go into a checkpoint's hyperparameters."""
    if isinstance(value, dict):
        return all(_is_plain(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
