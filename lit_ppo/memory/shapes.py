"""The models of a run without their weights: only ``config.json`` is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from lit_ppo.attention import autocast
from lit_ppo.models.compute import use_fused_gelu
from lit_ppo.models.lora import add_adapter
from lit_ppo.models.pretrained import SET_HERE, adapter_base
from lit_ppo.models.stored import Unusable, hub
from lit_ppo.rewards import reward_models
from lit_ppo.shown import first_line

NOT_OF_CONFIG = (*SET_HERE, "dtype", "torch_dtype")
StandIns = Mapping[str, Any]
"""Configurations of models that do not exist yet, since a stage writes them, by their path."""


@dataclass
class Part:
    """One model of a run.

    Args:
        name: Such as ``actor``.
        model: Its tensors have no storage.
        path: Folder or hub name.
        extra: Shapes of trained weights beside the model: the value head.
    """

    name: str
    model: PreTrainedModel
    path: str
    extra: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def trained(self) -> list[Tensor]:
        """Trained weights, without storage."""
        own = [p for p in self.model.parameters() if p.requires_grad]
        return own + [torch.empty(shape, device="meta") for shape in self.extra]

    @property
    def frozen(self) -> list[Tensor]:
        """Frozen weights, without storage."""
        return [p for p in self.model.parameters() if not p.requires_grad]


def local_bytes(tensors: list[Tensor], n_shards: int = 1) -> int:
    """Bytes that the first of several processes holds: each tensor is divided along its first dimension."""
    return sum(prod(local_shape(tensor, n_shards)) * tensor.element_size() for tensor in tensors)


def local_shape(tensor: Tensor, n_shards: int) -> tuple[int, ...]:
    """The shape of the first process' shard, the largest."""
    return (-(-tensor.shape[0] // n_shards), *tensor.shape[1:]) if tensor.ndim else ()


def config_of(argument: str, path: str, kwargs: dict[str, Any], stand_ins: StandIns) -> Any:
    """The configuration of a model, or of an adapter's base model.

    Args:
        argument: Class and argument, such as ``LitPPO(actor``, for messages.
        path: Folder or hub name.
        kwargs: Of ``from_pretrained``.
        stand_ins: See :data:`StandIns`.

    Raises:
        ValueError: There is no such model; names the argument.
    """
    if path in stand_ins:
        return stand_ins[path]
    try:
        base = adapter_base(path, kwargs) or path
        trust = bool(kwargs.get("trust_remote_code"))
        own = {name: value for name, value in kwargs.items() if name not in (*NOT_OF_CONFIG, *hub(kwargs))}
        return AutoConfig.from_pretrained(base, trust_remote_code=trust, **own, **hub(kwargs))
    except (OSError, ValueError, Unusable) as error:
        raise ValueError(
            f"{argument}={path!r}): its config.json cannot be read; give a local folder or a hub name "
            f"({first_line(error)})"
        ) from error


def hollow(auto: Any, config: Any, dtype: torch.dtype, kwargs: dict[str, Any]) -> PreTrainedModel:
    """A model on the meta device, in eval mode.

    Args:
        auto: Class of transformers.
        config: From :func:`config_of`.
        dtype: Of the weights.
        kwargs: Of ``from_pretrained``.
    """
    chosen = {name: kwargs[name] for name in ("attn_implementation", "trust_remote_code") if name in kwargs}
    if "flash" in str(chosen.get("attn_implementation")):  # which a machine without a GPU refuses
        del chosen["attn_implementation"]
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, **chosen).eval()
    use_fused_gelu(model)
    return model


def ppo_parts(module: Any, stand_ins: StandIns) -> list[Part]:
    """Actor, critic, reference and reward models of a LitPPO.

    Args:
        module: Before it has built its models.
        stand_ins: See :data:`StandIns`.
    """
    settings = module.model_settings
    owner, kwargs = settings.owner, settings.model_kwargs

    def causal_lm(name: str, path: str, dtype: torch.dtype = torch.float32) -> Part:
        config = config_of(f"{owner}({name}", path, kwargs, stand_ins)
        model = hollow(AutoModelForCausalLM, config, dtype, kwargs)
        if model.config._attn_implementation == "sdpa":
            model.config._attn_implementation = autocast.NAME
        return Part(name, model, path)

    parts = [causal_lm("actor", settings.actor)]
    if settings.actor_lora is not None:
        add_adapter(f"{owner}(actor_lora", parts[0].model, settings.actor_lora, settings.seed)
    rewards = [*reward_models(module.rewards), *reward_models(module.eval_rewards)]
    if settings.critic is not None:
        path = {"actor": settings.actor, "reward": rewards[0].path if rewards else ""}.get(
            settings.critic, settings.critic
        )
        critic = causal_lm("critic", path)
        critic.model = critic.model.base_model  # type: ignore[assignment]
        if settings.critic_lora is not None:
            add_adapter(f"{owner}(critic_lora", critic.model, settings.critic_lora, settings.seed)
        embeddings: Any = critic.model.get_input_embeddings()
        critic.extra = [(1, embeddings.weight.shape[1]), (1,)]
        parts.append(critic)
    if settings.reference is not None and (settings.reference != "actor" or settings.actor_lora is None):
        path = settings.actor if settings.reference == "actor" else settings.reference
        parts.append(_frozen(causal_lm("reference", path, getattr(torch, settings.reference_dtype or "float32"))))
    for i, reward in enumerate(dict.fromkeys(rewards)):
        config = config_of("RewardModel(model", reward.path, reward.model_kwargs, stand_ins)
        dtype = reward.model_kwargs["dtype"]
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model = hollow(AutoModelForSequenceClassification, config, dtype, reward.model_kwargs)
        if (text_config := model.config.get_text_config()).pad_token_id is None:  # the stock forward refuses batches
            text_config.pad_token_id = 0
        parts.append(_frozen(Part(f"reward model{f' {i + 1}' if i else ''}", model, reward.path)))
    return parts


def _frozen(part: Part) -> Part:
    nn.Module.requires_grad_(part.model, False)
    return part
