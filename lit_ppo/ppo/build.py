"""From paths to models and optimizers."""

from collections.abc import Callable
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_ppo.activations import checkpoint_activations
from lit_ppo.advantages import check_estimator
from lit_ppo.engines.base import Engine
from lit_ppo.engines.sampler import EngineSampler
from lit_ppo.generation.config import generation_config, say_stops
from lit_ppo.models.actor_critic import Actor, Critic, Reference
from lit_ppo.models.compute import compile_blocks, halve_frozen, in_bfloat16
from lit_ppo.models.load import load_causal_lm, load_critic
from lit_ppo.models.lora import WithoutAdapter, add_adapter
from lit_ppo.models.positions import safe_length
from lit_ppo.models.pretrained import check_not_quantized
from lit_ppo.optim.precision import rounds_at_random, seed_rounding
from lit_ppo.optim.settings import build_optimizer
from lit_ppo.parallel.sharding import build, check_placed, shard
from lit_ppo.ppo.collect import TransformersEngine
from lit_ppo.ppo.settings import Models, ModelSettings
from lit_ppo.rewards import RewardModel, place_reward_models, reward_models
from lit_ppo.validate import refuse

M = TypeVar("M", bound=nn.Module)


def configure_model(module: Any) -> None:
    """Build the models of a LitPPO, once; Lightning's hook.

    Args:
        module: The LitPPO.
    """
    strategy = None if module._trainer is None else module._trainer.strategy
    if module._built:
        check_placed(strategy, module)
        return
    models = build_models(module.model_settings, module.tokenizer, module.rewards, module.eval_rewards, strategy)
    module.actor, module.critic, module.reference = models.actor, models.critic, models.reference
    module.generation, module.safe_length = models.generation, models.safe_length
    module._built = True
    if module._trainer is None:
        module.to(module.device)  # where ``to`` has put the module before it had models


def train(module: Any, mode: bool = True) -> Any:
    """Switch to training or eval mode; score sources, like all our models, stay in eval mode."""
    L.LightningModule.train(module, mode)
    for source in (module.rewards, module.eval_rewards):
        if isinstance(source, nn.Module):
            source.train(False)
    return module


def configure_optimizers(module: Any) -> tuple[list[Optimizer], list[Any]]:
    """Build an optimizer and a schedule for actor and critic; Lightning's hook.

    Args:
        module: The LitPPO.
    """
    built = module.optimization.built
    for name, model in (("actor", module.actor), ("critic", module.critic)):
        if model is not None:
            make, make_schedule = module.factories[name]
            trained = [p for p in model.parameters() if p.requires_grad]
            built[name] = build_optimizer(module, f"{name}_", trained, make, make_schedule)
            built[name].check_steps_alone()
            if rounds_at_random(built[name].optimizer):
                seed_rounding(built[name].optimizer, module.seed)
    schedules = [entry.schedule for entry in built.values() if entry.schedule is not None]
    return [entry.optimizer for entry in built.values()], schedules


def build_models(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, rewards: Any, eval_rewards: Any, strategy: Any
) -> Models:
    """Load actor, critic, reference and reward models.

    Args:
        settings: What to build.
        tokenizer: The actor's.
        rewards: Score source whose reward models are loaded here.
        eval_rewards: The same for validation, or None.
        strategy: The Trainer's; None without one. Under one that shards, each rank keeps its shard.
    """
    actor = _place(settings, strategy, lambda: _make_actor(settings))
    generation = generation_config(settings.generation, settings.temperature, actor.model, tokenizer)
    rank_zero_info(say_stops(generation, settings.generation, actor.model, tokenizer))
    place_reward_models(strategy, rewards, eval_rewards)
    if settings.halve_frozen:
        for source in (rewards, eval_rewards):
            for reward_model in reward_models(source):
                if not reward_model.names_dtype:
                    halve_frozen(reward_model.model)
    reference: Reference | WithoutAdapter | None = None
    if settings.reference == "actor" and settings.actor_lora is not None:
        reference = WithoutAdapter(actor)
    elif settings.reference is not None:
        reference = _place(settings, strategy, lambda: _make_reference(settings), frozen=True)
    critic = None
    if settings.critic is not None:
        critic = _place(settings, strategy, lambda: _make_critic(settings, rewards))
    models = Models(actor, critic, reference, tokenizer, generation)
    models.safe_length = safe_length(models)
    check_models(settings, models, rewards)
    return models


def _place(settings: ModelSettings, strategy: Any, make: Callable[[], M], *, frozen: bool = False) -> M:
    """Build a model; under a strategy that shards, this rank keeps its shard."""
    model = build(strategy, make)
    if settings.halve_reference if frozen else settings.bfloat16_weights:
        in_bfloat16(model)
    if settings.halve_frozen:
        halve_frozen(model)
    if settings.compile_blocks:
        compile_blocks(model)
    if settings.activation_checkpointing and not frozen:
        checkpoint_activations(model)
    return shard(strategy, model, frozen=frozen)


def _make_actor(settings: ModelSettings) -> Actor:
    actor = Actor(settings.load_actor())
    _make_trainable(settings, "actor", settings.actor, actor.model, settings.actor_lora)
    return actor


def _make_reference(settings: ModelSettings) -> Reference:
    path = settings.actor if settings.reference == "actor" else str(settings.reference)
    dtype = getattr(torch, settings.reference_dtype or "float32")
    model = load_causal_lm(f"{settings.owner}(reference", path, settings.model_kwargs, dtype)
    return Reference(model, checked=path == settings.actor)


def _make_critic(settings: ModelSettings, rewards: Any) -> Critic:
    path, label = str(settings.critic), None
    if settings.critic == "actor":
        path = settings.actor
    elif settings.critic == "reward":
        if not isinstance(rewards, RewardModel):
            raise ValueError(
                f"{settings.owner}(critic='reward'): the rewards are not a RewardModel; use critic='actor' or a path"
            )
        path, label = rewards.path, int(rewards.label_index)
    critic = load_critic(f"{settings.owner}(critic", path, settings.model_kwargs, label)
    trained, most = getattr(critic.backbone.config, "response_tokens", None), settings.generation["max_new_tokens"]
    if trained not in (None, most):
        rank_zero_warn(
            f"{settings.owner}(critic={path!r}): LitCritic trained it for responses of {trained} tokens, but "
            f"max_new_tokens is {most}, so its values are those of another length; train it with response_tokens={most}"
        )
    _make_trainable(settings, "critic", path, critic.backbone, settings.critic_lora)
    return critic


def _make_trainable(settings: ModelSettings, name: str, path: str, model: Any, lora: dict[str, Any] | None) -> None:
    """Add the adapter; without one, all weights must be trainable."""
    if lora is not None:
        add_adapter(f"{settings.owner}({name}_lora", model, lora, settings.seed)
    else:
        check_not_quantized(
            f"{settings.owner}({name}={path!r})", model, f"give a model in full precision, or train {name}_lora"
        )


def check_critic(owner: Any, critic: str | None, advantages: Any) -> None:
    """Check that there is a critic if and only if the estimator reads values.

    Raises:
        ValueError: Names both.
    """
    estimator = type(advantages).__name__
    if isinstance(advantages, type) or not callable(advantages) or not hasattr(advantages, "needs_values"):
        problem = "not an estimator: it lacks needs_values, which says whether it takes a critic's values"
        refuse(owner, "advantages", advantages, problem)
    if critic is None and advantages.needs_values:
        refuse(owner, "critic", critic, f"{estimator} needs values; give a critic, or another estimator")
    if critic is not None and not advantages.needs_values:
        refuse(owner, "critic", critic, f"{estimator} uses no values; set critic to null")
    check_estimator(owner, advantages, owner.samples_per_prompt, owner.kl_coef)


def checked_engine(module: Any, engine: Any) -> TransformersEngine | EngineSampler | None:
    """The argument ``engine`` of a LitPPO whose other arguments of sampling are set; None: the default."""
    if engine is None or isinstance(engine, TransformersEngine):
        return None if type(engine) is TransformersEngine else engine  # a subclass samples by its own code
    if not isinstance(engine, Engine):
        refuse(module, "engine", engine, "must be an Engine, such as VLLMEngine(...), or None")
    unused = {"sampling_logprobs_tolerance": module.tolerance} | {
        f"rollout_batch_{name.rpartition('_')[2]}": value for name, value in module.rollout_limits.items()
    }
    for name, value in unused.items():
        if value is not None:
            problem = f"is of the actor's own decode loop, and engine={type(engine).__name__} samples; leave one out"
            refuse(module, name, value, problem)
    return EngineSampler(engine)


def check_models(settings: ModelSettings, models: Models, rewards: Any) -> None:
    """Check that the built models use the same tokens.

    Raises:
        ValueError: Names both sides.
    """
    owner, tokenizer, size = settings.owner, models.tokenizer, _vocab_size(models.actor.model)
    if len(tokenizer) > size:
        refuse(
            owner, "tokenizer", settings.tokenizer or settings.actor,
            f"has {len(tokenizer)} tokens, the actor in {settings.actor!r} only {size}; give the tokenizer that the "
            "actor was trained with",
        )  # fmt: skip
    others: dict[str, tuple[str | None, PreTrainedModel | None]] = {
        "reference": (settings.reference, None if models.reference is None else models.reference.model),
        "critic": (settings.critic, None if models.critic is None else models.critic.backbone),
    }
    for name, (path, other) in others.items():
        if other is not None and _vocab_size(other) != size:
            refuse(
                owner, name, path,
                f"its vocabulary has {_vocab_size(other)} tokens, that of the actor in {settings.actor!r} has {size}; "
                "they must share one",
            )  # fmt: skip
    if settings.critic == "reward" and rewards.tokenizer.get_vocab() != tokenizer.get_vocab():
        refuse(
            owner, "critic", "reward",
            "the reward model and the actor have different tokenizers, so the same ids mean other tokens; use "
            "critic='actor'",
        )  # fmt: skip


def _vocab_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)
