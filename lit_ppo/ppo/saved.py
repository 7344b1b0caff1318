"""What checkpoints of LitPPO hold, and its export in Hugging Face format."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters

from lit_ppo.callbacks.base import PPOCallback
from lit_ppo.constructor import arguments_of, constructor
from lit_ppo.data.tokenization import save_tokenizer
from lit_ppo.generation.config import stop_ids
from lit_ppo.models.actor_critic import Reference
from lit_ppo.models.card import Card, add_data, hub_name, write_card
from lit_ppo.models.export import (
    checked_dtype,
    checked_repository,
    list_files,
    push,
    save_generation_config,
    save_model,
)
from lit_ppo.models.lora import check_has_adapter, merged, save_adapter
from lit_ppo.models.pretrained import starting_dtype
from lit_ppo.models.stored import FROZEN_MODELS, Dtype, Stored, check_same_files
from lit_ppo.parallel.checkpoint_io import checked_entries
from lit_ppo.parallel.entries import check_complete, check_resumable, check_weights
from lit_ppo.parallel.files import write_checksums
from lit_ppo.parallel.full_state import full_weights
from lit_ppo.parallel.ranks import gather_shares, rank
from lit_ppo.ppo.settings import ModelSettings, check_moving_reference
from lit_ppo.rewards import described, stored_models
from lit_ppo.rewards.folders import check_not_read, folders_of

FROZEN = ("rewards.", "eval_rewards.")
OWN_NAME = re.compile(r"(?<![^.])(actor|critic|reference|rewards|eval_rewards)\..*")  # of a weight, without a prefix


def save_arguments(module: Any, **checked: Any) -> None:
    """Save the arguments of a LitPPO, and of a subclass, as hyperparameters, except those that no checkpoint can hold.

    Args:
        module: The LitPPO, whose constructor calls this.
        **checked: Arguments as its checks have changed them.
    """
    arguments = arguments_of(module) | checked
    given = _given_hyperparameters.get()  # by Lightning's command, which saves what it needs to build the module again
    token = _given_hyperparameters.set(arguments if given is None else given)
    try:
        module.save_hyperparameters(ignore=[name for name, value in arguments.items() if not _is_plain(value)])
    finally:
        _given_hyperparameters.reset(token)


def save_arguments_of(subclass: type[Any], /, **options: Any) -> None:
    """See to it that the arguments of a subclass of LitPPO are saved, too; Python's hook of new subclasses."""
    super(L.LightningModule, subclass).__init_subclass__(**options)
    if "__init__" in vars(subclass):
        subclass.__init__ = constructor(subclass.__init__)


def _is_plain(value: Any, depth: int = 20) -> bool:
    if isinstance(value, dict):
        return depth > 0 and all(_is_plain(entry, depth - 1) for entry in value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_plain(entry, depth - 1) for entry in value)
    return value is None or isinstance(value, str | int | float | bool)


def state_dict(module: Any, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
    """Weights without the frozen ones: the reference is loaded from its own path, unless a callback moves it."""
    if module.checkpoint_reference:
        check_moving_reference(module.model_settings, module.reference)
    saved = _is_saved(module)
    weights: dict[str, Any] = L.LightningModule.state_dict(module, *args, prefix=prefix, **kwargs)
    for name in [name for name in weights if name.startswith(prefix) and not saved(name.removeprefix(prefix))]:
        del weights[name]
    return weights


def load_state_dict(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Load weights; the models are built before, for those that come back from ranks of ``ddp_spawn``, too."""
    module.configure_model()
    return L.LightningModule.load_state_dict(module, *args, **kwargs)


def leave_out_frozen(module: Any) -> None:
    """Let no frozen weight be missing where weights are loaded: ``state_dict`` has none of them."""
    module.strict_loading = False  # on_load_checkpoint checks the rest
    module.register_load_state_dict_post_hook(_forget_frozen)


def _forget_frozen(module: Any, found: Any) -> None:
    """Take frozen weights off the missing and unexpected names, also where the LitPPO is part of another module."""
    saved = _is_saved(module)
    for names in found:
        names[:] = [name for name in names if (own := OWN_NAME.search(name)) is None or saved(own[0])]


def on_save_checkpoint(module: Any, checkpoint: dict[str, Any]) -> None:
    """Add the counts that random draws depend on, the optimizers' settings, and what models start from."""
    optimization = module.optimization
    checkpoint["lit_ppo"] = {
        "rollouts": module.rollouts,
        "skipped_steps": optimization.skipped_steps,
        "updates": dict(optimization.updates),
        "optimizers": {name: built.settings for name, built in optimization.built.items()},
    }
    checkpoint[FROZEN_MODELS] = _frozen(module)
    if module.rollout_ahead:
        checkpoint["lit_ppo"]["ahead"] = module.sampler.ahead_state()


def on_load_checkpoint(module: Any, checkpoint: dict[str, Any]) -> None:
    """Check that the checkpoint was written by this class with the same models, then restore the counts.

    Raises:
        ValueError: Names the weights that are missing or unexpected, or a frozen model that is another one.
    """
    owner, trainer = type(module).__name__, module._trainer
    module.configure_model()  # Lightning has done so
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    expected = set(filter(_is_saved(module), names))  # without gathering any weights
    found = checkpoint.get("state_dict", {}).keys()
    if "lit_ppo" not in checkpoint or expected - found:
        missing = ", ".join(sorted(expected - found)[:3]) or "lit_ppo"
        raise ValueError(
            f"Checkpoint does not match this {owner}; missing: {missing}; use the models of the run that wrote it"
        )
    if more := sorted(name for name in found - expected if name.startswith(_adapted(module.model_settings))):
        raise ValueError(
            f"Checkpoint does not match the adapters of this {owner}; unexpected: {more[0]}; give actor_lora and "
            "critic_lora of the run that wrote it"
        )
    state = checkpoint["lit_ppo"]
    with checked_entries(getattr(trainer, "ckpt_path", None)):
        check_weights(checkpoint, expected)
        needed = [f"lit_ppo.{name}" for name in ("rollouts", "skipped_steps", "updates", "optimizers")]
        check_complete(checkpoint, [*needed, FROZEN_MODELS])
        if trainer is not None and trainer.state.fn == "fit":
            check_resumable(trainer, checkpoint, state["optimizers"])
    _check_frozen(module, checkpoint[FROZEN_MODELS])
    module.rollouts, module.optimization.skipped_steps = state["rollouts"], state["skipped_steps"]
    module.optimization.updates = dict(state["updates"])
    module.optimization.resumed = state["optimizers"], checkpoint.get("lr_schedulers", [])
    if module.rollout_ahead:
        module.sampler.ahead.load(state.get("ahead", []))


def _frozen(module: Any) -> dict[str, Stored]:
    """Where models were loaded from whose weights checkpoints do not hold, by argument."""
    settings, found = module.model_settings, {}
    if settings.actor_lora is not None:
        found["actor"] = module.actor.model.stored
    if settings.critic_lora is not None:
        found["critic"] = module.critic.backbone.stored
    if isinstance(module.reference, Reference) and not module.checkpoint_reference:
        found["reference"] = module.reference.model.stored
    return found | stored_models("rewards", module.rewards) | stored_models("eval_rewards", module.eval_rewards)


def _check_frozen(module: Any, started: dict[str, Stored]) -> None:
    """Check that frozen models are those of the run; an evaluation may name other paths of what is not its policy."""
    trainer, now = module._trainer, _frozen(module)
    if trainer is None or trainer.state.fn != "fit":
        of_policy = ("actor", "critic")
        now = {k: v for k, v in now.items() if k in of_policy or v["path"] == started.get(k, v)["path"]}
    path = getattr(trainer, "ckpt_path", None)
    gather_shares(lambda: check_same_files(module, path or "this checkpoint", started, now))


def _is_saved(module: Any) -> Callable[[str], bool]:
    """Which weights checkpoints hold, by name: the trained models; of a model with an adapter, only the adapter."""
    frozen = FROZEN if module.checkpoint_reference else (*FROZEN, "reference.")
    adapted = _adapted(module.model_settings)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return lambda name: not name.startswith(frozen) and (not name.startswith(adapted) or name in trained)


def _adapted(settings: ModelSettings) -> tuple[str, ...]:
    """First part of the names of weights of models with an adapter."""
    fields = {"actor.": settings.actor_lora, "critic.": settings.critic_lora}
    return tuple(prefix for prefix, given in fields.items() if given is not None)


def only_actor(module: Any) -> None:
    """Build nothing but the actor, which is all that :func:`save_pretrained` writes."""
    settings = module.model_settings
    settings.critic = settings.reference = settings.critic_lora = None
    module.rewards = module.eval_rewards = None


def save_pretrained(
    module: Any,
    dirpath: str | Path,
    *,
    adapter: bool = False,
    dtype: Dtype | None = None,
    push_to_hub: str | None = None,
) -> None:
    """Write the actor in Hugging Face format: weights, config, tokenizer, generation config, model card.

    The generation config is that of the actor's checkpoint, with the stop tokens of training. Call it on every rank
    where the strategy shards; the first one writes.

    Args:
        module: The LitPPO.
        dirpath: Folder; made if it does not exist.
        adapter: Write only the adapter, for ``peft``. Otherwise an adapter is merged into the weights, for which the
            actor is loaded once more.
        dtype: Of the weights; None: that of the actor's checkpoint (of an adapter: float32).
        push_to_hub: Then push the folder to this repository, such as ``me/my-model``.

    Raises:
        ValueError: There is no adapter; the folder is a file, or the module reads it; or it is not a dtype, or not the
            name of a repository.
        RuntimeError: The folder is written, but cannot be pushed.
    """
    check_has_adapter(f"save_pretrained(adapter={adapter})", module, adapter)
    given, repository = checked_dtype("save_pretrained", dtype), checked_repository("save_pretrained", push_to_hub)
    check_not_read(f"save_pretrained({str(dirpath)!r})", dirpath, folders_of(module))
    settings, models = module.model_settings, module.models
    has_adapter = settings.actor_lora is not None
    weights = full_weights(models.actor, "model.", trained=has_adapter)
    if weights is not None and rank() != 0:
        return
    model, stops = models.actor.model, stop_ids(models.generation)
    ends = stops[0] if len(stops) == 1 else stops or None
    written = starting_dtype(model) if given is None else getattr(torch, given)
    if adapter:
        save_adapter(model, weights, dirpath, None if given is None else written)
        save_generation_config(model, dirpath, ends)
    elif has_adapter:
        full = merged(model, weights, lambda: settings.load_actor(model.dtype))
        save_model(full, None, dirpath, dtype=written, stops=ends)
    else:
        save_model(model, weights, dirpath, dtype=written, stops=ends)
    save_tokenizer(models.tokenizer, dirpath, keep_pad=False)
    write_card(dirpath, add_data(module.card(), module._trainer), adapter=adapter)
    write_checksums(Path(dirpath))
    list_files(dirpath)
    if repository is not None and rank() == 0:
        push(f"save_pretrained(push_to_hub={repository!r})", dirpath, repository)


def card(module: Any) -> Card:
    """What the model card of an export says about the LitPPO and its callbacks."""
    settings, given = module.model_settings, module.hparams
    coef = given.get("kl_coef", module.kl_coef)
    to = "the starting model" if settings.reference == "actor" else f"`{settings.reference}`"
    kl = (
        f"{coef:g} x {module.kl_estimator} in the rewards, to {to}" if coef else f"measured to {to}, not in the rewards"
    )
    lora = None if settings.actor_lora is None else ", ".join(f"{k}: {v}" for k, v in settings.actor_lora.items())
    callbacks = getattr(module._trainer, "callbacks", [])
    tricks = [type(callback).__name__ for callback in callbacks if isinstance(callback, PPOCallback)]
    rows = {
        "base": f"`{settings.actor}`",
        "reward": described(module.rewards),
        "KL": "none: no reference" if settings.reference is None else kl,
        "adapter": lora,
        "advantages": str(module.advantages),
        "tricks": ", ".join(tricks),
        "sampling": f"max_new_tokens {settings.generation['max_new_tokens']}, temperature {module.temperature:g}",
        "seed": str(module.seed),
    }
    return {
        "method": "PPO",
        "task": "text-generation",
        "base": settings.actor,
        "base_model": hub_name(settings.actor),
        "rows": {name: text for name, text in rows.items() if text},
    }
