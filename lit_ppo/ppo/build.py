"""Loading and saving: models, optimizers and what a checkpoint holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_ppo.data.tokenization import save_tokenizer
from lit_ppo.generation.transformers import generation_config
from lit_ppo.models.actor_critic import (
    Actor,
    Critic,
    Reference,
    checkpoint_activations,
    compile_blocks,
    load_causal_lm,
    load_critic,
    load_tokenizer,
)
from lit_ppo.models.lora import WithoutAdapter, add_adapter, merged, save_adapter
from lit_ppo.optim.schedules import per_step
from lit_ppo.optim.settings import BuiltOptimizer, restore_settings
from lit_ppo.parallel.full_state import full_weights
from lit_ppo.parallel.ranks import rank
from lit_ppo.parallel.sharding import build, check_placed, shard
from lit_ppo.ppo.checks import ReferenceDtype, check_has_adapter, check_models, check_saved_reference
from lit_ppo.ppo.collect import Policy
from lit_ppo.rewards import RewardModel, place_reward_models

M = TypeVar("M", bound=nn.Module)
FROZEN = ("rewards.", "eval_rewards.")


class Assembly(Policy):
    """Builds LitPPO from the paths that it was given, and takes it apart for checkpoints and export."""

    paths: dict[str, str | None]  # actor, tokenizer, critic, reference
    factories: dict[str, tuple[OptimizerCallable, LRSchedulerCallable | None]]
    generation_fields: dict[str, Any]
    model_kwargs: dict[str, Any]
    reference_dtype: ReferenceDtype
    lora: dict[str, dict[str, Any] | None]  # actor, critic
    activation_checkpointing: bool
    compile_blocks: bool
    checkpoint_reference: bool
    skipped_steps: int
    _tokenizer: PreTrainedTokenizerBase | None
    _built: bool
    _optimizers_built: dict[str, BuiltOptimizer]
    _resumed: tuple[dict[str, Any], list[Any]] | None  # settings and states of a checkpoint, until training starts

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The actor's tokenizer, loaded when first needed: a data module may have written it only just before."""
        if self._tokenizer is None:
            argument = "tokenizer" if self.paths["tokenizer"] != self.paths["actor"] else "actor"
            trust = bool(self.model_kwargs.get("trust_remote_code"))
            self._tokenizer = load_tokenizer(
                f"LitPPO({argument})", str(self.paths["tokenizer"]), trust_remote_code=trust
            )
        return self._tokenizer

    def configure_model(self) -> None:
        """Load actor, critic, reference and reward model, once."""
        if self._built:
            check_placed(self._strategy, self)
            return
        self.actor = self._placed(self._make_actor)
        self.generation = generation_config(self.generation_fields, self.temperature, self.actor.model, self.tokenizer)
        self.actor.model.generation_config = self.generation
        place_reward_models(self._strategy, self.rewards, self.eval_rewards)
        self.reference = None
        if self.paths["reference"] == "actor" and self.lora["actor"] is not None:
            self.reference = WithoutAdapter(self.actor)
        elif self.paths["reference"] is not None:
            self.reference = self._placed(self._make_reference, frozen=True)
        self.critic = None
        if self.paths["critic"] is not None:
            self.critic = self._placed(self._make_critic)
        check_models(self)
        self._built = True

    def _make_actor(self) -> Actor:
        actor = Actor(self._load_actor())
        self._adapt("actor", actor.model)
        return actor

    def _load_actor(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return load_causal_lm(f"{type(self).__name__}(actor)", str(self.paths["actor"]), self.model_kwargs, dtype)

    def _make_reference(self) -> Reference:
        path = str(self.paths["actor" if self.paths["reference"] == "actor" else "reference"])
        dtype = getattr(torch, self.reference_dtype)
        return Reference(load_causal_lm(f"{type(self).__name__}(reference)", path, self.model_kwargs, dtype))

    def _make_critic(self) -> Critic:
        start, label = self._critic_source()
        critic = load_critic(f"{type(self).__name__}(critic)", start, self.model_kwargs, label)
        self._adapt("critic", critic.backbone)
        return critic

    def _adapt(self, name: str, model: PreTrainedModel) -> None:
        """Have an adapter trained in place of the whole model, where one was asked for."""
        fields = self.lora[name]
        if fields is not None:
            add_adapter(f"{type(self).__name__}({name}_lora", model, fields, self.seed)

    @property
    def _strategy(self) -> Any:
        """The Trainer's; None without one."""
        return None if self._trainer is None else self._trainer.strategy

    def _placed(self, make: Callable[[], M], *, frozen: bool = False) -> M:
        """Build a model and leave this rank its share of it, where the strategy shards."""
        model = build(self._strategy, make)
        if self.compile_blocks:
            compile_blocks(model)
        if self.activation_checkpointing and not frozen:
            checkpoint_activations(model)
        return shard(self._strategy, model, frozen=frozen)

    def _critic_source(self) -> tuple[str, int | None]:
        """Where the critic's weights come from, and which output of a reward model its head starts as."""
        critic = str(self.paths["critic"])
        if critic == "actor":
            return str(self.paths["actor"]), None
        if critic != "reward":
            return critic, None
        if not isinstance(self.rewards, RewardModel):
            raise ValueError("LitPPO(critic='reward'): the rewards are no RewardModel; use critic='actor' or a path")
        return self.rewards.path, int(self.rewards.label_index)

    def configure_optimizers(self) -> Any:
        """One optimizer and schedule each for actor and critic."""
        self._optimizers_built = {
            name: self._build_optimizer(name, model)
            for name, model in (("actor", self.actor), ("critic", self.critic))
            if model is not None
        }
        built = self._optimizers_built.values()
        return [entry.optimizer for entry in built], [entry.schedule for entry in built if entry.schedule is not None]

    def _build_optimizer(self, name: str, model: nn.Module) -> BuiltOptimizer:
        optimizer_of, scheduler_of = self.factories[name]
        optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
        where = f"{type(self).__name__}({name}"

        def schedule(optimizer: Optimizer) -> Any:
            assert scheduler_of is not None
            return per_step(f"{where}_scheduler", scheduler_of(optimizer), self)

        return BuiltOptimizer(f"{where}_optimizer", optimizer, schedule if scheduler_of is not None else None)

    def on_train_start(self) -> None:
        """Have rates and schedules that a resumed run was given take effect."""
        if self._resumed is not None:
            restore_settings(self.trainer, self._optimizers_built, *self._resumed, steps=self.trainer.global_step)
            self._resumed = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Weights without the frozen ones: the reference is loaded from its own path, unless a callback moves it."""
        check_saved_reference(self)
        is_saved = self._saved()
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if is_saved(name)}

    def _saved(self) -> Callable[[str], bool]:
        """Which names of weights checkpoints hold; of a model with an adapter, those that are trained."""
        frozen = FROZEN if self.checkpoint_reference else (*FROZEN, "reference.")
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return lambda name: not name.startswith(frozen) and (not name.startswith(self._adapted) or name in trained)

    @property
    def _adapted(self) -> tuple[str, ...]:
        """What the names of weights of models with an adapter begin with."""
        built = [name for name, fields in self.lora.items() if fields is not None and getattr(self, name, None)]
        return tuple(f"{name}." for name in built)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counts that random draws depend on."""
        settings = {name: entry.settings for name, entry in self._optimizers_built.items()}
        checkpoint["lit_ppo"] = {
            "rollouts": self.rollouts, "skipped_steps": self.skipped_steps, "optimizers": settings
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is one of this module's, then restore the counts."""
        names = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        expected = set(filter(self._saved(), names))  # without gathering any weights
        found = checkpoint.get("state_dict", {}).keys()
        if "lit_ppo" not in checkpoint or expected - found:
            missing = ", ".join(sorted(expected - found)[:3]) or "lit_ppo"
            raise ValueError(f"the checkpoint is none of {type(self).__name__} with these models: it lacks {missing}")
        if more := sorted(name for name in found - expected if name.startswith(self._adapted)):
            raise ValueError(
                f"the checkpoint is none of {type(self).__name__} with these adapters: it holds {more[0]} besides; "
                "give actor_lora and critic_lora of the run that wrote it"
            )
        self.rollouts = checkpoint["lit_ppo"]["rollouts"]
        self.skipped_steps = checkpoint["lit_ppo"]["skipped_steps"]
        self._resumed = checkpoint["lit_ppo"]["optimizers"], checkpoint.get("lr_schedulers", [])

    def only_actor(self) -> None:
        """Build nothing but what :meth:`save_pretrained` writes: the other models need not even be there any more."""
        self.paths |= {"critic": None, "reference": None}
        self.lora["critic"] = None
        self.rewards = self.eval_rewards = None  # type: ignore[assignment]

    def save_pretrained(self, dirpath: str | Path, *, adapter: bool = False) -> None:
        """Write the actor in Hugging Face format: weights, config, tokenizer, generation config.

        To be called on every rank where the strategy shards; the first one writes. An adapter is merged into the
        weights, for which the actor is loaded once more.

        Args:
            dirpath: Folder; made if it does not exist.
            adapter: Write the adapter alone, for ``peft``.

        Raises:
            ValueError: There is no adapter.
        """
        check_has_adapter(f"save_pretrained(adapter={adapter})", self, adapter)
        weights = full_weights(self.actor, "model.", trained=self.lora["actor"] is not None)
        if weights is None or rank() == 0:
            model = self.actor.model
            if adapter:
                save_adapter(model, weights, dirpath)
                self.generation.save_pretrained(dirpath)
            elif self.lora["actor"] is not None:
                whole = merged(model, weights, lambda: self._load_actor(model.dtype))
                whole.generation_config = self.generation
                whole.save_pretrained(dirpath)
            else:
                model.save_pretrained(dirpath, state_dict=weights)
            save_tokenizer(self.tokenizer, dirpath)
