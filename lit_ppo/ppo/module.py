"""LitPPO: proximal policy optimization of a language model, from a reward."""

from functools import cached_property
from typing import Any, get_args

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lit_ppo.advantages import GAE, AdvantageEstimator
from lit_ppo.callbacks.base import fire
from lit_ppo.constructor import constructor
from lit_ppo.data.batch import PromptBatch
from lit_ppo.data.chat import checked_options
from lit_ppo.engines.base import Engine
from lit_ppo.experience import Experience, LossReduction
from lit_ppo.functional import KLEstimator, token_rewards
from lit_ppo.generation.config import checked_generation
from lit_ppo.memory.advice import explain_memory
from lit_ppo.models.actor_critic import Actor, Critic, Reference
from lit_ppo.models.lora import WithoutAdapter
from lit_ppo.optim.precision import MatmulPrecision, checked_matmul_precision
from lit_ppo.optim.settings import checked_factories
from lit_ppo.ppo import build, evaluate, optimize, own_loop, preflight, saved, settings, text_loss
from lit_ppo.ppo.collect import Policy, TransformersEngine, rollout_with_hooks, sample_responses, score_experience
from lit_ppo.ppo.metrics import Progress, current_coefficients, log_update
from lit_ppo.ppo.optimize import add_logprobs
from lit_ppo.ppo.prompts import Origin, as_batch
from lit_ppo.ppo.settings import Models, ModelSettings, ReferenceDtype
from lit_ppo.rewards import Rewards, ScoreSource, WeightedSource, as_source, eval_sources, source_names
from lit_ppo.validate import integer, non_negative_or_none, number, one_of, samples, seconds_or_none


class LitPPO(L.LightningModule):
    """Trains a causal language model with PPO to raise a score.

    One global step is one update: sample responses, score them, turn scores into token rewards and advantages, then
    take ``ppo_epochs`` passes of optimizer steps over them. ``collect`` and ``update`` call the hooks of
    ``lit_ppo.callbacks``; override ``collect`` or ``training_step``, or write the loop yourself with ``step``.

    Args:
        actor: Folder or hub name of the causal LM to train.
        tokenizer: Folder or hub name; by default the actor's own.
        critic: ``"actor"`` or ``"reward"`` (start from that model's weights), a path, or None (no critic).
        reference: ``"actor"`` (a frozen copy of the model that the run starts from), a path, or None: no KL term.
        reference_dtype: ``"bfloat16"``: half the memory, rounded log-probs. None: by the Trainer's precision.
        actor_lora: Fields of ``peft.LoraConfig``, such as ``{r: 16, target_modules: all-linear}``: trains an adapter.
            The actor without it is the reference. Usually with ten times the learning rate.
        critic_lora: The same for the critic, whose value head is always trained in full.
        rewards: A ``RewardModel``, a ``RewardFunction``, any callable ``(prompts, responses, **columns)``, or a dict
            of these by name, each plain or as ``{source: ..., weight: ...}``. None: scores come from your own loop.
        eval_rewards: Rewards by name for validation and test only: their means, and win rates over the reference.
        advantages: Estimator; of those in ``lit_ppo.advantages`` only ``GAE`` takes a critic.
        generation: Fields of ``transformers.GenerationConfig``, ``cache_implementation`` too; needs ``max_new_tokens``.
        engine: Samples responses, such as ``VLLMEngine``. None: ``TransformersEngine``, the actor's own decode loop.
        rollout_ahead: 1: a server samples the next batch during the update, one update off-policy; saves waiting.
        temperature: Of sampling and of all log-probs.
        samples_per_prompt: Responses per prompt; several where the estimator compares them.
        kl_coef: Weight of the KL to the reference in the token rewards.
        kl_estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        clip_range: Of the probability ratio; ``[0.2, 0.28]``: below and above 1 (DAPO); None: no clipping.
        ppo_epochs: Passes over the experience.
        minibatch_size: Responses per optimizer step, over all ranks.
        micro_batch_size: Maximum number of responses in one forward of one rank, sampling aside.
        micro_batch_tokens: Instead: maximum number of tokens in one forward, padding included.
        rollout_batch_size: Maximum number of responses that one rank samples at once; None: all. Samples stay the same.
        rollout_batch_tokens: Instead: maximum number of their tokens, with prompts and ``max_new_tokens`` each.
        sampling_logprobs_tolerance: Keep sampling's log-probs if training's agree within this (saves 3%). None: never.
        loss_reduction: ``"token_mean"``, ``"sequence_mean"`` (over each response, then over responses), or a number
            of tokens, such as ``max_new_tokens``: the sum over (responses x this number), as in Dr. GRPO.
        actor_optimizer: From parameters to optimizer. The rate is usually a tenth of that of fine-tuning (SFT).
        critic_optimizer: From parameters to optimizer. The rate is usually about twice that of SFT.
        actor_scheduler: From optimizer to learning-rate schedule, one step per update.
        critic_scheduler: From optimizer to learning-rate schedule, one step per update.
        max_grad_norm: Of actor and critic each; None: no clipping.
        max_skipped_steps: Consecutive steps that may be skipped because a loss or gradient is not finite.
        activation_checkpointing: Recompute activations: less memory, a third more time. None: on CUDA by need.
        compile_blocks: ``torch.compile`` the models, except for sampling; the first update takes a minute longer.
        float32_matmul_precision: ``"highest"``, ``"high"`` (TF32) or ``"medium"``. None: on CUDA ``"high"``.
        reward_timeout: Seconds that scoring a rank's responses may take; then the run ends. None: no limit.
        model_kwargs: For ``from_pretrained``, such as ``trust_remote_code: true``, without which no model's code runs.
        chat_template_kwargs: Variables of the chat template, such as ``{enable_thinking: false}``.
        skip_special_tokens: False: keep them in the text of responses, for rewards that read ``<think>``.
        seed: Of sampling and of minibatches; by default that of ``seed_everything``.
    """

    actor: Actor
    critic: Critic | None
    reference: Reference | WithoutAdapter | None
    generation: GenerationConfig
    safe_length: float

    @constructor
    def __init__(
        self,
        actor: str,
        *,
        tokenizer: str | None = None,
        critic: str | None = "actor",
        reference: str | None = "actor",
        reference_dtype: ReferenceDtype | None = None,
        actor_lora: dict[str, Any] | None = None,
        critic_lora: dict[str, Any] | None = None,
        rewards: Rewards | None = None,
        eval_rewards: dict[str, WeightedSource | ScoreSource] | None = None,
        advantages: AdvantageEstimator = GAE(),  # noqa: B008  # stateless
        generation: dict[str, Any],
        engine: Engine | None = None,
        rollout_ahead: int = 0,
        temperature: float = 1.0,
        samples_per_prompt: int = 1,
        kl_coef: float = 0.05,
        kl_estimator: KLEstimator = "k1",
        clip_range: float | list[float] | None = 0.2,
        ppo_epochs: int = 4,
        minibatch_size: int = 32,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        rollout_batch_size: int | None = None,
        rollout_batch_tokens: int | None = None,
        sampling_logprobs_tolerance: float | None = None,
        loss_reduction: LossReduction = "token_mean",
        actor_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-7, weight_decay=0.0, fused=True),
        critic_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=9e-6, weight_decay=0.0, fused=True),
        actor_scheduler: LRSchedulerCallable | None = None,
        critic_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: float | None = 1.0,
        max_skipped_steps: int = 0,
        activation_checkpointing: bool | None = None,
        compile_blocks: bool = False,
        float32_matmul_precision: MatmulPrecision | None = None,
        reward_timeout: float | None = None,
        model_kwargs: dict[str, Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        skip_special_tokens: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        generation = checked_generation(self, generation)
        saved.save_arguments(self, generation=generation)
        self.automatic_optimization = False
        saved.leave_out_frozen(self)
        self.seed = settings.checked_seed(self, seed)
        self.temperature = number(self, "temperature", temperature, at_least=1e-3, at_most=1e3)
        self.chat_template_kwargs = checked_options(self, chat_template_kwargs)
        self.model_settings = ModelSettings(
            owner=type(self).__name__, actor=actor, tokenizer=tokenizer, critic=critic, reference=reference,
            reference_dtype=reference_dtype, actor_lora=actor_lora, critic_lora=critic_lora,
            activation_checkpointing=activation_checkpointing, compile_blocks=compile_blocks,
            generation=generation, temperature=self.temperature, seed=self.seed,
            model_kwargs=settings.checked_kwargs(self, model_kwargs), skip_special_tokens=skip_special_tokens,
        )  # fmt: skip
        self.rewards = None if rewards is None else as_source(rewards, self)
        self.source_names = source_names(self.rewards)  # scores of several rewards are in ``extras`` by name
        self.eval_rewards = None if eval_rewards is None else eval_sources(self, self.rewards, eval_rewards)
        self.advantages = advantages
        self.samples_per_prompt = samples(self, "samples_per_prompt", samples_per_prompt)
        self.kl_coef = number(self, "kl_coef", kl_coef, at_least=0, at_most=1e6)
        self.kl_estimator = one_of(self, "kl_estimator", kl_estimator, get_args(KLEstimator))
        self.clip_range = settings.checked_clip_range(self, clip_range)
        self.ppo_epochs = integer(self, "ppo_epochs", ppo_epochs)
        self.minibatch_size = integer(self, "minibatch_size", minibatch_size)
        self.limits = settings.batch_limits(self, "micro", micro_batch_size, micro_batch_tokens)
        self.rollout_limits = settings.batch_limits(self, "rollout", rollout_batch_size, rollout_batch_tokens)
        self.tolerance = non_negative_or_none(self, "sampling_logprobs_tolerance", sampling_logprobs_tolerance)
        self.sampler = build.checked_engine(self, engine)
        self.rollout_ahead = settings.checked_ahead(self, rollout_ahead)
        self.loss_reduction = settings.checked_reduction(self, loss_reduction)
        self.matmul_precision = checked_matmul_precision(self, float32_matmul_precision)
        self.reward_timeout = seconds_or_none(self, "reward_timeout", reward_timeout)
        self.optimization = optimize.Optimization(self, max_grad_norm, max_skipped_steps)
        makers = {"actor": (actor_optimizer, actor_scheduler), "critic": (critic_optimizer, critic_scheduler)}
        self.factories = checked_factories(self, makers)
        build.check_critic(self, critic, advantages)
        self.evaluator, self.progress, self.own_engine = evaluate.Evaluator(), Progress(), TransformersEngine()
        self.rollouts = 0  # training rollouts so far: the number of the update in every random draw
        self._built = self.actor_frozen = self.critic_frozen = self.checkpoint_reference = False  # callbacks set three
        self.n_actions = self.n_critic_states = self.replay = 0  # what callbacks ask of training rollouts and steps
        self.sampling_difference: float | None = None
        self.loop: own_loop.OwnLoop | None = None  # after ``attach``, true while it runs

    # The arrow: prompts -> rollout -> scores -> token rewards -> advantages -> minibatch losses -> optimizer steps

    def training_step(self, prompts: Any, batch_idx: int) -> None:
        """One update."""
        try:
            self.update(self.collect(prompts))
        except RuntimeError as error:
            explain_memory(self, error, self.progress.phase, self.progress.detail)
            raise

    def collect(self, prompts: Any) -> Experience:
        """Sample responses to the prompts and score them, or take what ``step`` was given; calls the hooks."""
        if self.loop:
            experience = self.loop.take()
        else:
            experience = rollout_with_hooks(self, prompts, self.rollout)
            experience.raw_scores = experience.scores = self.score(experience)
        fire(self, "on_scores", experience)
        return experience

    def update(self, experience: Experience) -> None:
        """Learn from scored experience, as :meth:`collect` returns it; calls the hooks."""
        if self.loop and self.loop.waiting:
            raise RuntimeError(f"{type(self).__name__}.update: in a loop of your own call step(experience)")
        coefficients = current_coefficients(self.kl_coef, self.trainer.optimizers)
        self.progress.start("update")
        experience.rewards = token_rewards(experience.scores, experience.kl, experience.response_mask, self.kl_coef)
        fire(self, "on_rewards", experience)
        experience.advantages, experience.returns = self.advantages(experience)
        fire(self, "on_advantages", experience)
        self.optimization.trained = {name for name in ("actor", "critic") if not getattr(self, f"{name}_frozen")}
        steps: list[dict[str, float]] = []
        n_steps = self.ppo_epochs * -(-len(experience.responses) // self.minibatch_size)
        minibatches = experience.minibatches(
            self.minibatch_size, epochs=self.ppo_epochs, seed=(self.seed, self.rollouts), reduction=self.loss_reduction
        )
        for minibatch in minibatches:
            if experience.exhausted:
                break
            self.progress.detail = f"step {len(steps) + 1}/{n_steps}"
            metrics = self.backward_minibatch(minibatch)
            fire(self, "on_minibatch_end", experience, metrics)
            steps.append(metrics)
            if not experience.exhausted:
                self.step_optimizers(metrics, experience)
        fire(self, "on_update_end", experience)
        self.optimization.end_update(self)
        log_update(self, experience, coefficients, steps)

    # What callbacks call

    @torch.inference_mode(False)
    @torch.no_grad()
    def rollout(
        self,
        prompts: Any,
        *,
        samples_per_prompt: int | None = None,
        do_sample: bool = True,
        policy: Policy = "actor",
        logprobs: bool = True,
        stream: str | None = None,
    ) -> Experience:
        """Sample responses, the same on every rank.

        Args:
            prompts: Strings, lists of chat messages, a ``PromptBatch``, or an ``Experience`` (one row per group).
            samples_per_prompt: By default the module's.
            do_sample: False: greedy.
            policy: Which model samples.
            logprobs: Also compute log-probs, reference log-probs, KL and values.
            stream: None: the random stream of training, which advances with each rollout; a name: a fixed stream.
        """
        if self.loop and self.loop.waiting:
            options = {"do_sample": do_sample, "policy": policy, "logprobs": logprobs, "stream": stream}
            return self.loop.rollout(LitPPO.rollout, prompts, samples_per_prompt=samples_per_prompt, **options)
        models, is_batch = self.models, isinstance(prompts, PromptBatch)
        batch = prompts if is_batch else as_batch(prompts, models.tokenizer, self.chat_template_kwargs)
        random = (self.seed, stream or "train", self.rollouts if stream is None else 0)
        experience, sampled = sample_responses(
            models, batch, samples_per_prompt or self.samples_per_prompt, random if do_sample else None,
            policy=policy, sampling_logprobs=policy == "actor" and self.tolerance is not None, device=self.device,
            engine=(policy == "actor" and self.sampler) or self.own_engine, limits=self.rollout_limits,
            progress=self.progress, skip_special_tokens=self.model_settings.skip_special_tokens,
        )  # fmt: skip
        self.rollouts += stream is None
        if logprobs:
            self.progress.detail = "log-probs"
            add_logprobs(self, models, experience, sampled, trains=stream is None)
        experience.origin = Origin(self)
        return experience

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The actor's tokenizer, loaded on first use: a data module may have written it only just before."""
        return self.model_settings.load_tokenizer()

    @property
    def models(self) -> Models:
        """Everything that samples and learns; without a Trainer it is built here."""
        if not self._built:
            self.configure_model()
        return Models(self.actor, self.critic, self.reference, self.tokenizer, self.generation, self.safe_length)

    # More methods, each a function in the file that is named: what callbacks call, then Lightning's hooks.

    score, step_optimizers = score_experience, optimize.step_optimizers
    actor_optimizer, backward_minibatch = property(optimize.actor_optimizer), optimize.backward_minibatch
    backward_on_text, loss_on_text, exact_kl = text_loss.backward_on_text, text_loss.loss_on_text, text_loss.exact_kl
    save_pretrained, card, __init_subclass__ = saved.save_pretrained, saved.card, classmethod(saved.save_arguments_of)
    attach, step, on_before_batch_transfer = own_loop.attach, own_loop.step, own_loop.on_before_batch_transfer
    configure_model, configure_optimizers = build.configure_model, build.configure_optimizers
    on_fit_start, on_train_start, only_actor = preflight.on_fit_start, preflight.on_train_start, saved.only_actor
    train, setup, on_train_batch_start = build.train, preflight.setup, preflight.on_train_batch_start
    validation_step, test_step, predict_step = evaluate.validation_step, evaluate.test_step, evaluate.predict_step
    on_predict_start, on_predict_end = evaluate.on_predict_start, evaluate.on_predict_end
    state_dict, load_state_dict = saved.state_dict, saved.load_state_dict  # type: ignore[assignment]
    on_save_checkpoint, on_load_checkpoint = saved.on_save_checkpoint, saved.on_load_checkpoint
