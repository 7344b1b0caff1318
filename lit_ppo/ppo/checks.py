"""What LitPPO refuses before it builds anything, and once its models are built."""

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

from transformers import PreTrainedModel

from lit_ppo.experience import LossReduction
from lit_ppo.functional import KLEstimator
from lit_ppo.generation.transformers import FILTERS, NEUTRAL, check_generation
from lit_ppo.models.lora import WithoutAdapter, check_lora

if TYPE_CHECKING:
    from lit_ppo.ppo.build import Assembly

ReferenceDtype = Literal["float32", "bfloat16"]


def check_arguments(name: str, given: dict[str, Any]) -> None:
    """Check constructor arguments.

    Args:
        name: The class, for messages.
        given: Argument -> value.

    Raises:
        ValueError: Names class, argument and value, and says what to do.
    """

    def refuse(argument: str, why: str) -> None:
        raise ValueError(f"{name}({argument}={given[argument]!r}): {why}")

    for argument in ("ppo_epochs", "minibatch_size", "samples_per_prompt", "micro_batch_size", "micro_batch_tokens"):
        value = given[argument]
        optional = argument.startswith("micro_batch")
        if not (optional and value is None) and not _is_integer(value, at_least=1):
            refuse(argument, "must be an integer over 0")
    if (given["micro_batch_size"] is None) == (given["micro_batch_tokens"] is None) and given["micro_batch_size"]:
        refuse("micro_batch_tokens", "give it or micro_batch_size, not both")
    for argument in ("temperature", "max_grad_norm", "clip_range", "reward_timeout"):
        value = given[argument]
        optional = argument != "temperature"
        if not (optional and value is None) and not (_is_number(value) and 0 < value < math.inf):
            refuse(argument, "must be a finite number over 0" + (", or null for none" if optional else ""))
    tolerance = given["sampling_logprobs_tolerance"]
    if tolerance is not None and not (_is_number(tolerance) and 0 <= tolerance < math.inf):
        refuse("sampling_logprobs_tolerance", "must be a finite number, 0 or more, or null to compute them again")
    if not (_is_number(given["kl_coef"]) and 0 <= given["kl_coef"] < math.inf):
        refuse("kl_coef", "must be a finite number, 0 or more")
    if not _is_integer(given["max_skipped_steps"], at_least=0):
        refuse("max_skipped_steps", "must be an integer, 0 or more")
    if given["seed"] is not None and not _is_integer(given["seed"], at_least=0):
        refuse("seed", "must be an integer, 0 or more")
    if given["kl_estimator"] not in get_args(KLEstimator):
        refuse("kl_estimator", f"must be one of {', '.join(get_args(KLEstimator))}")
    if given["loss_reduction"] not in get_args(LossReduction):
        refuse("loss_reduction", f"must be one of {', '.join(get_args(LossReduction))}")
    if given["reference_dtype"] not in get_args(ReferenceDtype):
        refuse("reference_dtype", f"must be one of {', '.join(get_args(ReferenceDtype))}")
    if given["reference"] is None and given["reference_dtype"] != "float32":
        refuse("reference_dtype", "there is no reference; leave it out, or give a reference")
    if given["reference"] == "actor" and given["actor_lora"] is not None and given["reference_dtype"] != "float32":
        refuse("reference_dtype", "the reference is the actor without its adapter (actor_lora); leave it out")
    for argument in ("actor_lora", "critic_lora"):
        if given[argument] is not None:
            check_lora(f"{name}({argument}", given[argument])
    if given["critic"] is None and given["critic_lora"] is not None:
        refuse("critic_lora", "there is no critic; leave it out")
    if {"dtype", "torch_dtype"} & set(given["model_kwargs"] or {}):
        refuse("model_kwargs", "trained weights are kept in float32; give the Trainer a precision instead")
    if not hasattr(given["advantages"], "needs_values"):
        refuse("advantages", "is no estimator: it lacks needs_values, which says whether it takes a critic's values")
    if given["critic"] is None and given["advantages"].needs_values:
        refuse("critic", f"{type(given['advantages']).__name__} needs values; give a critic, or another estimator")
    if given["critic"] is not None and not given["advantages"].needs_values:
        refuse("critic", f"{type(given['advantages']).__name__} uses no values; set critic to null")
    check_estimator(name, given["advantages"], given["samples_per_prompt"], given["kl_coef"])
    check_generation(given["generation"])


def check_estimator(name: str, advantages: Any, samples_per_prompt: int, kl_coef: float) -> None:
    """Check what an estimator learns from; callbacks may set both numbers at any update.

    Args:
        name: The module's class, for messages.
        advantages: The estimator.
        samples_per_prompt: In force.
        kl_coef: In force.

    Raises:
        ValueError: Names both sides.
    """
    estimator = type(advantages).__name__
    if getattr(advantages, "needs_groups", False) and samples_per_prompt < 2:
        raise ValueError(
            f"{name}(samples_per_prompt={samples_per_prompt!r}): {estimator} compares the responses to one prompt; "
            "sample at least 2, or use another estimator"
        )
    if not getattr(advantages, "needs_rewards", True) and kl_coef > 0:
        raise ValueError(
            f"{name}(kl_coef={kl_coef!r}): {estimator} reads scores alone, so a KL in the token rewards would be "
            "without effect; set kl_coef to 0 and put the KL into the loss with lit_ppo.callbacks.KLLoss"
        )


def check_loggers(loggers: list[Any], names: list[str]) -> None:
    """Refuse a logger that would fail at the first update, or the first validation.

    Args:
        loggers: The trainer's.
        names: Of rewards and judges, each of which is logged as ``.../score/<name>``, beside ``.../score``.

    Raises:
        ValueError: Naming it.
    """
    for logger in loggers:
        uri = str(getattr(logger, "_tracking_uri", "sqlite:"))  # of MLflow's
        if names and (uri.startswith("file:") or ":" not in uri):
            raise ValueError(
                f"{type(logger).__name__}(tracking_uri={uri!r}): a store of files, in which val/score cannot be both "
                f"a metric and the folder of val/score/{names[0]}; use a data base, such as sqlite:///mlflow.db"
            )


def _is_integer(value: Any, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def reshaping(generation: dict[str, Any]) -> list[str]:
    """Fields that sample from another distribution than the log-probs are of."""
    return [
        name
        for name, value in generation.items()
        if value is not None and value != NEUTRAL.get(name, value if name not in FILTERS else None)
        and name in (*FILTERS, "repetition_penalty", "no_repeat_ngram_size")
    ]  # fmt: skip


def check_models(module: "Assembly") -> None:
    """Check that the built models speak of the same tokens.

    Raises:
        ValueError: Names both sides.
    """
    actor, tokenizer = module.actor.model, module.tokenizer
    if len(tokenizer) > _vocab_size(actor):
        raise ValueError(
            f"LitPPO(tokenizer={module.paths['tokenizer']!r}): has {len(tokenizer)} tokens, the actor in "
            f"{module.paths['actor']!r} only {_vocab_size(actor)}; give the tokenizer that the actor was trained with"
        )
    others: dict[str, PreTrainedModel | None] = {
        "reference": None if module.reference is None else module.reference.model,
        "critic": None if module.critic is None else module.critic.backbone,
    }
    for name, other in others.items():
        if other is not None and _vocab_size(other) != _vocab_size(actor):
            raise ValueError(
                f"LitPPO({name}={module.paths[name]!r}): its vocabulary has {_vocab_size(other)} tokens, that of the "
                f"actor in {module.paths['actor']!r} has {_vocab_size(actor)}; they must share one"
            )
    if module.paths["critic"] == "reward":
        theirs = getattr(module.rewards, "tokenizer").get_vocab()  # noqa: B009  # a RewardModel: critic_source checked
        if theirs != tokenizer.get_vocab():
            raise ValueError(
                "LitPPO(critic='reward'): the reward model's tokenizer is not the actor's, so its weights mean other "
                "tokens; use critic='actor'"
            )


def check_saved_reference(module: "Assembly") -> None:
    """Check that a reference which callbacks move, and checkpoints hold, can take small moves.

    Raises:
        ValueError: It is the actor itself, or not in float32.
    """
    if module.checkpoint_reference and isinstance(module.reference, WithoutAdapter):
        raise ValueError(
            f"LitPPO(actor_lora={module.lora['actor']!r}): a callback moves the reference (checkpoint_reference=True), "
            "and it is the actor without its adapter; remove the callback, or train the whole actor"
        )
    if module.checkpoint_reference and module.reference_dtype != "float32":
        raise ValueError(
            f"LitPPO(reference_dtype={module.reference_dtype!r}): a callback moves the reference "
            "(checkpoint_reference=True), and small moves round away in it; use 'float32'"
        )


def check_has_adapter(where: str, module: object, adapter: bool) -> None:
    """Check that a module which is to export an adapter trains one.

    Args:
        where: Class or method and argument, for messages.
        module: The module.
        adapter: Whether an adapter is to be exported.

    Raises:
        ValueError: It does not.
    """
    if adapter and getattr(module, "lora", {}).get("actor") is None:
        raise ValueError(
            f"{where}: {type(module).__name__} trains no adapter; leave it out, or give LitPPO an actor_lora"
        )


def _vocab_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)
