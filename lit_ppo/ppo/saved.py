"""What checkpoints of LitPPO hold, and its export in Hugging Face format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L

from lit_ppo.data.tokenization import save_tokenizer
from lit_ppo.models.lora import check_has_adapter, merged, save_adapter
from lit_ppo.parallel.full_state import full_weights
from lit_ppo.parallel.ranks import rank
from lit_ppo.ppo.preflight import check_moving_reference
from lit_ppo.ppo.settings import ModelSettings

FROZEN = ("rewards.", "eval_rewards.")


def not_plain(**arguments: Any) -> list[str]:
    """Names of the arguments that cannot go into a checkpoint's hyperparameters."""
    return [name for name, value in arguments.items() if not _is_plain(value)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def state_dict(module: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Weights without the frozen ones: the reference is loaded from its own path, unless a callback moves it."""
    if module.checkpoint_reference:
        check_moving_reference(module.model_settings, module.reference)
    saved = _is_saved(module)
    weights = L.LightningModule.state_dict(module, *args, **kwargs)
    return {name: value for name, value in weights.items() if saved(name)}


def on_save_checkpoint(module: Any, checkpoint: dict[str, Any]) -> None:
    """Add the counts that random draws depend on, and the optimizers' settings."""
    optimization = module.optimization
    checkpoint["lit_ppo"] = {
        "rollouts": module.rollouts,
        "skipped_steps": optimization.skipped_steps,
        "optimizers": {name: built.settings for name, built in optimization.built.items()},
    }


def on_load_checkpoint(module: Any, checkpoint: dict[str, Any]) -> None:
    """Check that the checkpoint was written by this class with the same models, then restore the counts.

    Raises:
        ValueError: Names the weights that are missing or unexpected.
    """
    owner = type(module).__name__
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
    module.rollouts, module.optimization.skipped_steps = state["rollouts"], state["skipped_steps"]
    module.optimization.resumed = state["optimizers"], checkpoint.get("lr_schedulers", [])


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


def save_pretrained(module: Any, dirpath: str | Path, *, adapter: bool = False) -> None:
    """Write the actor in Hugging Face format: weights, config, tokenizer, generation config.

    Call it on every rank where the strategy shards; the first one writes.

    Args:
        module: The LitPPO.
        dirpath: Folder; made if it does not exist.
        adapter: Write only the adapter, for ``peft``. Otherwise an adapter is merged into the weights, for which the
            actor is loaded once more.

    Raises:
        ValueError: There is no adapter.
    """
    check_has_adapter(f"save_pretrained(adapter={adapter})", module, adapter)
    settings, generation = module.model_settings, module.generation
    has_adapter = settings.actor_lora is not None
    weights = full_weights(module.actor, "model.", trained=has_adapter)
    if weights is not None and rank() != 0:
        return
    model = module.actor.model
    if adapter:
        save_adapter(model, weights, dirpath)
        generation.save_pretrained(dirpath)
    elif has_adapter:
        full = merged(model, weights, lambda: settings.load_actor(model.dtype))
        full.generation_config = generation
        full.save_pretrained(dirpath)
    else:
        model.save_pretrained(dirpath, state_dict=weights)
    save_tokenizer(module.tokenizer, dirpath)
