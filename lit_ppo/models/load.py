"""The models and the tokenizer of PPO, from local folders and hub names alike; errors name the argument."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_ppo.models.actor_critic import Critic
from lit_ppo.models.pretrained import (
    check_causal_lm,
    check_complete,
    load_pretrained,
    n_outputs,
    tokenizer_path,
)
from lit_ppo.models.stored import Unusable
from lit_ppo.shown import first_line

T = TypeVar("T")


def load_tokenizer(argument: str, path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model. One without a pad token pads with its stop token; masks tell them apart."""

    def load() -> PreTrainedTokenizerBase:
        name = tokenizer_path(path)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        return tokenizer

    tokenizer = _named(argument, path, load)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{argument}={path!r}): the tokenizer has no eos_token, so no response could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    argument: str, path: str, model_kwargs: dict[str, Any], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal LM. Trained ones are kept in float32: in bf16 an Adam step at 5e-7 would round away.

    Raises:
        ValueError: It cannot be loaded, or the checkpoint lacks weights; names the argument.
    """
    model, missing = _named(
        argument, path, lambda: load_pretrained(AutoModelForCausalLM, path, dtype=dtype, **model_kwargs)
    )
    check_causal_lm(f"{argument}={path!r})", model, missing)
    return model


def load_critic(argument: str, path: str, model_kwargs: dict[str, Any], label: int | None = None) -> Critic:
    """A critic that starts from a causal LM, or from a reward model and its scoring head.

    Args:
        argument: Class and argument of the path, such as ``LitPPO(critic``, for messages.
        path: Local folder or hub name.
        model_kwargs: For ``from_pretrained``.
        label: Index of the reward model's output that is the reward, where it has several.

    Raises:
        ValueError: It cannot be loaded, or the checkpoint lacks weights of the backbone; names the argument.
    """

    def load() -> tuple[PreTrainedModel, list[str]]:
        auto = AutoModelForCausalLM if n_outputs(path, model_kwargs) is None else AutoModelForSequenceClassification
        return load_pretrained(auto, path, dtype=torch.float32, **model_kwargs)

    model, missing = _named(argument, path, load)
    where, inside = f"{argument}={path!r})", f"{model.base_model_prefix}."
    check_complete(where, model, [name for name in missing if name.startswith(inside)])
    backbone: Any = model.base_model
    backbone.stored = model.stored
    score: Any = None if any(name.startswith("score.") for name in missing) else getattr(model, "score", None)
    if score is None or (label is None and score.out_features != 1):
        rank_zero_info(f"{where}: the value head is new; values start at 0")
        return Critic(backbone)
    rank_zero_info(f"{where}: the value head starts as the reward model's scoring head")
    return Critic(backbone, head=score.weight[label or 0].unsqueeze(0))


def _named(argument: str, path: str, load: Callable[[], T]) -> T:
    """Load something; errors name the argument and say what to do.

    Raises:
        ValueError: Neither a folder with a model nor a hub name that can be reached.
    """
    try:
        return load()
    except Unusable as error:
        raise ValueError(f"{argument}={path!r}): {error}") from error
    except (OSError, ValueError) as error:
        if "contains custom code" in str(error):
            raise ValueError(
                f"{argument}={path!r}): comes with its own code; if you trust it, set model_kwargs: "
                "{trust_remote_code: true}"
            ) from error
        folder = Path(path)
        where = "the folder holds no complete model" if folder.is_dir() else "no such folder, nor a hub model in reach"
        if any(folder.glob("*.safetensors")):
            where = "cannot be loaded"
        reason = first_line(error)
        raise ValueError(f"{argument}={path!r}): {where}; give a local folder or a hub name ({reason})") from error
