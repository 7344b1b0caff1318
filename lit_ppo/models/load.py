"""The only ``from_pretrained`` of trained models: local folders and hub names alike."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_ppo.models.actor_critic import Critic


def load_tokenizer(argument: str, path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model. One without a pad token pads with its stop token; masks tell them apart."""
    tokenizer = _from_pretrained(AutoTokenizer, argument, path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{argument}={path!r}): the tokenizer has no eos_token, so no response could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


def load_causal_lm(
    argument: str, path: str, model_kwargs: dict[str, Any], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal LM. Trained ones are kept in float32: in bf16 an Adam step at 5e-7 would round away."""
    return _from_pretrained(AutoModelForCausalLM, argument, path, dtype=dtype, **model_kwargs)  # type: ignore[no-any-return]


def load_critic(argument: str, path: str, model_kwargs: dict[str, Any], label: int | None = None) -> Critic:
    """A critic that starts from a causal LM, or from a reward model and its scoring head.

    Args:
        argument: Class and argument of the path, such as ``LitPPO(critic``, for messages.
        path: Local folder or hub name.
        model_kwargs: For ``from_pretrained``.
        label: Index of the reward model's output that is the reward, where it has several.
    """
    trust = bool(model_kwargs.get("trust_remote_code"))
    config = _from_pretrained(AutoConfig, argument, path, trust_remote_code=trust)
    if not (config.architectures or [""])[0].endswith("ForSequenceClassification"):
        return Critic(_from_pretrained(AutoModel, argument, path, dtype=torch.float32, **model_kwargs))
    model = _from_pretrained(AutoModelForSequenceClassification, argument, path, dtype=torch.float32, **model_kwargs)
    score = getattr(model, "score", None)
    if score is None or (label is None and score.out_features != 1):
        return Critic(model.base_model)
    return Critic(model.base_model, head=score.weight[label or 0].unsqueeze(0))


def _from_pretrained(auto: Any, argument: str, path: str, **kwargs: Any) -> Any:
    """``auto.from_pretrained``, without running code from the model's folder unless asked for.

    Raises:
        ValueError: Neither a folder with a model nor a hub name that can be reached; names the argument.
    """
    try:
        loaded = auto.from_pretrained(path, **{"trust_remote_code": False, **kwargs})
    except (OSError, ValueError) as error:
        if "contains custom code" in str(error):
            raise ValueError(
                f"{argument}={path!r}): comes with its own code; if you trust it, set model_kwargs: "
                "{trust_remote_code: true}"
            ) from error
        where = (
            "the folder holds no complete model" if Path(path).is_dir() else "no such folder, nor a hub model in reach"
        )
        reason = str(error).splitlines()[0]
        raise ValueError(f"{argument}={path!r}): {where}; give a local folder or a hub name ({reason})") from error
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ValueError(f"{argument}={path!r}): holds an adapter, not a full model; export it merged")
    return loaded
