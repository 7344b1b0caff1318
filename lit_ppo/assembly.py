"""Loading and saving: models, optimizers and what a checkpoint holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from lit_ppo.checks import ReferenceDtype, check_models, check_saved_reference
from lit_ppo.distributed import rank
from lit_ppo.models import (
    Actor,
    Reference,
    checkpoint_activations,
    compile_blocks,
    load_causal_lm,
    load_critic,
    load_tokenizer,
)
from lit_ppo.optimizer_settings import BuiltOptimizer, restore_settings
from lit_ppo.policy import Policy
from lit_ppo.rewards import RewardModel
from lit_ppo.rollout import generation_config
from lit_ppo.schedulers import per_step
from lit_ppo.sharding import build, check_placed, shard
from lit_ppo.whole import whole_weights

M = TypeVar("M", bound=nn.Module)


class Assembly(Policy):
    """Builds LitPPO from the paths that it was given, and takes it apart for checkpoints and export."""

    paths: dict[str, str | None]  # actor, tokenizer, critic, reference
    factories: dict[str, tuple[OptimizerCallable, LRSchedulerCallable | None]]
    generation_fields: dict[str, Any]
    model_kwargs: dict[str, Any]
    reference_dtype: ReferenceDtype
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
        name, actor_path = type(self).__name__, str(self.paths["actor"])
        self.actor = self._placed(lambda: Actor(load_causal_lm(f"{name}(actor)", actor_path, self.model_kwargs)))
        self.generation = generation_config(self.generation_fields, self.temperature, self.actor.model, self.tokenizer)
        self.actor.model.generation_config = self.generation
        self._build_rewards()
        self.reference = None
        if self.paths["reference"] is not None:
            path = actor_path if self.paths["reference"] == "actor" else str(self.paths["reference"])
            dtype = getattr(torch, self.reference_dtype)
            self.reference = self._placed(
                lambda: Reference(load_causal_lm(f"{name}(reference)", path, self.model_kwargs, dtype)), frozen=True
            )
        self.critic = None
        if self.paths["critic"] is not None:
            start, label = self._critic_source()
            self.critic = self._placed(lambda: load_critic(f"{name}(critic)", start, self.model_kwargs, label))
        check_models(self)
        self._built = True

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

    def _build_rewards(self) -> None:
        """Load what scores; of our own kind of reward model, each rank keeps a share."""
        for source in self.reward_models:
            built = build(self._strategy, source.built)
            if built is not source:  # another rank built it
                vars(source).clear()
                vars(source).update(vars(built))
            source.requires_grad_(False).eval()
            source.model = shard(self._strategy, source.model, frozen=True)
        if hasattr(self.rewards, "build"):
            self.rewards.build()
        if isinstance(self.rewards, nn.Module):
            self.rewards.requires_grad_(False).eval()

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
        frozen = ("rewards.",) if self.checkpoint_reference else ("rewards.", "reference.")
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if not k.startswith(frozen)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counts that random draws depend on."""
        settings = {name: entry.settings for name, entry in self._optimizers_built.items()}
        checkpoint["lit_ppo"] = {
            "rollouts": self.rollouts, "skipped_steps": self.skipped_steps, "optimizers": settings
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is one of this module's, then restore the counts."""
        frozen = ("rewards.",) if self.checkpoint_reference else ("rewards.", "reference.")
        names = {name.replace("_fsdp_wrapped_module.", "") for name, _ in self.named_parameters(remove_duplicate=False)}
        expected = {name for name in names if not name.startswith(frozen)}  # without gathering any weights
        found = checkpoint.get("state_dict", {}).keys()
        if "lit_ppo" not in checkpoint or expected - found:
            missing = ", ".join(sorted(expected - found)[:3]) or "lit_ppo"
            raise ValueError(f"the checkpoint is none of {type(self).__name__} with these models: it lacks {missing}")
        self.rollouts = checkpoint["lit_ppo"]["rollouts"]
        self.skipped_steps = checkpoint["lit_ppo"]["skipped_steps"]
        self._resumed = checkpoint["lit_ppo"]["optimizers"], checkpoint.get("lr_schedulers", [])

    def only_actor(self) -> None:
        """Build nothing but what :meth:`save_pretrained` writes: the other models need not even be there any more."""
        self.paths |= {"critic": None, "reference": None}
        self.rewards = None  # type: ignore[assignment]

    def save_pretrained(self, dirpath: str | Path) -> None:
        """Write the actor in Hugging Face format: weights, config, tokenizer, generation config.

        To be called on every rank where the strategy shards; the first one writes.

        Args:
            dirpath: Folder; made if it does not exist.
        """
        weights = whole_weights(self.actor, "model.")
        if weights is None or rank() == 0:
            self.actor.model.save_pretrained(dirpath, state_dict=weights)
            self.tokenizer.save_pretrained(str(dirpath))
