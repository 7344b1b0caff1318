"""The arguments of LitPPO: which models to build, what is built of them, and checks."""

import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_ppo.experience import LossReduction
from lit_ppo.functional import ClipRange
from lit_ppo.generation.engine import Limits
from lit_ppo.models.actor_critic import Actor, Critic, Reference
from lit_ppo.models.load import load_causal_lm, load_tokenizer
from lit_ppo.models.lora import WithoutAdapter, check_lora
from lit_ppo.models.stored import checked_model_kwargs
from lit_ppo.validate import (
    LARGEST_COUNT,
    boolean,
    integer,
    number,
    one_of,
    path_or_name,
    positive_or_none,
    refuse,
    seed_number,
)

ReferenceDtype = Literal["float32", "bfloat16"]


@dataclass(kw_only=True)
class ModelSettings:
    """Arguments of ``LitPPO``; their meaning is described there.

    Raises:
        ValueError: They do not fit together. Names class, argument and value, and says what to do.
    """

    owner: str  # name of the class, for messages
    actor: str
    tokenizer: str | None
    critic: str | None
    reference: str | None
    reference_dtype: ReferenceDtype | None
    actor_lora: dict[str, Any] | None
    critic_lora: dict[str, Any] | None
    activation_checkpointing: bool | None  # None: where it is needed
    compile_blocks: bool
    generation: dict[str, Any]
    temperature: float
    model_kwargs: dict[str, Any]
    seed: int
    skip_special_tokens: bool = True
    halve_frozen: bool = False  # keep frozen linear layers in bfloat16; the Trainer decides
    bfloat16_weights: bool = False  # keep actor and critic in bfloat16; the Trainer decides this, too
    halve_reference: bool = False  # keep the reference as they are

    def __post_init__(self) -> None:
        """Check the arguments against each other, before anything is loaded."""
        path_or_name(self.owner, "actor", self.actor)
        for argument in ("actor", "tokenizer", "critic", "reference"):
            if getattr(self, argument) is not None:
                setattr(self, argument, path_or_name(self.owner, argument, getattr(self, argument)))
        dtype = self.reference_dtype
        if dtype is not None:
            one_of(self.owner, "reference_dtype", dtype, get_args(ReferenceDtype))
        if dtype == "bfloat16" and self.reference is None:
            refuse(self.owner, "reference_dtype", dtype, "there is no reference; leave it out, or give a reference")
        if dtype == "bfloat16" and self.reference == "actor" and self.actor_lora is not None:
            problem = "the reference is the actor without its adapter (actor_lora); leave reference_dtype out"
            refuse(self.owner, "reference_dtype", dtype, problem)
        for argument, fields in (("actor_lora", self.actor_lora), ("critic_lora", self.critic_lora)):
            if fields is not None:
                check_lora(f"{self.owner}({argument}", fields)
        if self.critic is None and self.critic_lora is not None:
            refuse(self.owner, "critic_lora", self.critic_lora, "there is no critic; leave it out")
        for argument in ("skip_special_tokens", "activation_checkpointing", "compile_blocks"):
            if argument != "activation_checkpointing" or self.activation_checkpointing is not None:
                boolean(self.owner, argument, getattr(self, argument))

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The actor's tokenizer."""
        argument = "actor" if self.tokenizer is None else "tokenizer"
        trust = bool(self.model_kwargs.get("trust_remote_code"))
        return load_tokenizer(f"{self.owner}({argument}", self.tokenizer or self.actor, trust_remote_code=trust)

    def load_actor(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The causal LM that the actor starts from."""
        return load_causal_lm(f"{self.owner}(actor", self.actor, self.model_kwargs, dtype)


@dataclass
class Models:
    """Everything that samples and learns."""

    actor: Actor
    critic: Critic | None
    reference: Reference | WithoutAdapter | None
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig
    safe_length: float = 0.0  # prompts of so many tokens fit all of them; longer ones are checked


def checked_kwargs(owner: object, value: Any) -> dict[str, Any]:
    """The argument ``model_kwargs``."""
    given = checked_model_kwargs(owner, value)
    if {"dtype", "torch_dtype"} & given.keys():
        problem = "trained weights are loaded in float32; give the Trainer a precision instead"
        refuse(owner, "model_kwargs", given, problem)
    return given


def check_moving_reference(settings: ModelSettings, reference: Any) -> None:
    """Check that a reference which callbacks move, and which checkpoints then hold, can take small moves.

    Raises:
        ValueError: It is the actor itself, or not in float32.
    """
    if isinstance(reference, WithoutAdapter):
        refuse(
            settings.owner, "actor_lora", settings.actor_lora,
            "a callback moves the reference (checkpoint_reference=True), which is the actor without its adapter; "
            "remove the callback, or train the full actor",
        )  # fmt: skip
    if settings.reference_dtype == "bfloat16":
        refuse(
            settings.owner, "reference_dtype", settings.reference_dtype,
            "a callback moves the reference (checkpoint_reference=True), and small moves round away in it; use "
            "'float32'",
        )  # fmt: skip


def checked_ahead(module: Any, value: Any) -> int:
    """The argument ``rollout_ahead`` of a LitPPO whose engine is set."""
    ahead = integer(module, "rollout_ahead", value, at_least=0, at_most=1)
    engine = None if module.sampler is None else module.sampler.engine
    if ahead and (engine is None or not (engine.own_weights and engine.overlaps)):
        name = "TransformersEngine" if engine is None else type(engine).__name__
        refuse(
            module, "rollout_ahead", value,
            f"engine={name} samples in the training process, where nothing overlaps; use a server, "
            "such as VLLMEngine(mode='server'), or leave it out",
        )  # fmt: skip
    return ahead


def batch_limits(owner: object, kind: str, size: int | None, tokens: int | None) -> Limits:
    """The arguments that limit the batches of a kind (``micro`` or ``rollout``), checked; at most one is given."""
    if size is not None and tokens is not None:
        refuse(owner, f"{kind}_batch_tokens", tokens, f"give it or {kind}_batch_size, not both")
    return {
        "micro_batch_size": None if size is None else integer(owner, f"{kind}_batch_size", size),
        "micro_batch_tokens": None if tokens is None else integer(owner, f"{kind}_batch_tokens", tokens),
    }


def checked_seed(owner: object, value: Any) -> int:
    """The argument ``seed``; None: that of ``seed_everything``."""
    return seed_number(owner, "seed", int(os.environ.get("PL_GLOBAL_SEED", "0")) if value is None else value)


def checked_clip_range(owner: object, value: Any) -> ClipRange | None:
    """The argument ``clip_range``: a finite number above 0, two of them for below and above 1, or None."""
    if not isinstance(value, list | tuple):
        return positive_or_none(owner, "clip_range", value)
    if len(value) != 2:
        refuse(owner, "clip_range", value, "give one number, or two: how far the ratio may go below 1, and above")
    low, high = (number(owner, f"clip_range[{i}]", side, above=0) for i, side in enumerate(value))
    return low, high


def checked_reduction(owner: object, value: Any) -> LossReduction:
    """The argument ``loss_reduction``."""
    if isinstance(value, str) and value in ("token_mean", "sequence_mean"):
        return value  # type: ignore[return-value]
    if type(value) is int and 0 < value <= LARGEST_COUNT:
        return value
    refuse(
        owner, "loss_reduction", value,
        "must be one of 'token_mean', 'sequence_mean', or a number of tokens, at least 1, by which each response's sum "
        "is divided",
    )  # fmt: skip
