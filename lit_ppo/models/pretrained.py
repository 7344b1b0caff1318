"""``from_pretrained`` for every model: names of wrappers are stripped, adapters merged in, missing weights reported."""

import re
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils.peft_utils import find_adapter_config_file

from lit_ppo.models.stored import Unusable, check_files, hub, no_pickled_code, stored, stored_dtype, weight_files
from lit_ppo.shown import first_line, message_of, reason, written

# names that torch.compile, FSDP1 and activation checkpointing put anywhere into a weight's name
INSIDE = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# and what DDP, DeepSpeed, TRL's value heads, peft and modules around a model put before it
BEFORE = ("module", "_forward_module", "pretrained_model", "base_model", "model", "actor", "policy")
OTHER_HEADS = re.compile("Classification|Reward|Score|QuestionAnswering")


SET_HERE = ("trust_remote_code", "ignore_mismatched_sizes")
# raised where neither from_pretrained nor the model's config takes an argument
WRONG_ARGUMENT = (
    TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, ImportError, StrictDataclassError,
)  # fmt: skip


@no_pickled_code()
def load_pretrained(auto: Any, path: str, **kwargs: Any) -> tuple[PreTrainedModel, list[str]]:
    """Load a model, or a base model and the adapter in a folder, merged.

    Args:
        auto: Class of transformers.
        path: Folder or hub name.
        **kwargs: For ``from_pretrained``; code from the model's folder runs only with ``trust_remote_code``.

    Returns:
        The model, and the names of weights that the checkpoint lacks; these have random values.

    Raises:
        Unusable: It cannot be used; says what to do.
        OSError: transformers cannot load it. A ``ValueError`` too.
    """
    kwargs = {"trust_remote_code": False, **kwargs, "ignore_mismatched_sizes": True}  # they count as missing
    check_files(path, kwargs)
    if adapter_base(path, kwargs) is not None:
        return _merged(auto, path, kwargs)
    try:
        model, info = auto.from_pretrained(path, output_loading_info=True, **kwargs)
    except WRONG_ARGUMENT as error:
        given = {k: v for k, v in kwargs.items() if k not in SET_HERE and not isinstance(v, torch.dtype)}
        if not given or isinstance(error, torch.OutOfMemoryError):
            raise
        problem = f"cannot be loaded with model_kwargs={written(given)} ({reason(error)}); correct or leave them out"
        raise Unusable(problem) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise Unusable("it holds a full model and an adapter; remove one of them, or save them merged")
    missing = _missing(info)
    if missing:
        model, missing = _without_wrappers(model, missing, path, kwargs)
    model.starting_dtype, model.stored = stored_dtype(path, kwargs), stored(path, kwargs, model.config)
    return model, missing


def starting_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of the checkpoint that :func:`load_pretrained` loaded; that of the model if it is from scratch."""
    return getattr(model, "starting_dtype", model.dtype)


def adapter_base(path: str, kwargs: dict[str, Any] | None = None) -> str | None:
    """The base model of an adapter's folder or hub name; None where there is a full model, or nothing.

    Raises:
        Unusable: peft is not installed, or the adapter does not name its base.
    """
    where = hub(kwargs or {})
    try:
        file = find_adapter_config_file(path, **where)
    except (OSError, ValueError):  # the caller will say that there is no such model
        return None
    if file is None or (Path(file).parent / "config.json").exists():
        return None
    if find_spec("peft") is None:
        raise Unusable("it holds an adapter, which needs peft; pip install 'lit-ppo[peft]'")
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(path, **where).base_model_name_or_path
    if not base:
        raise Unusable("its adapter_config.json names no base_model_name_or_path; write the base model's path there")
    beside = Path(path) / str(base)  # a path may be relative to the adapter
    return str(beside if beside.is_dir() else base)


@no_pickled_code()
def n_outputs(path: str, kwargs: dict[str, Any]) -> int | None:
    """The number of outputs of a sequence classifier, such as a reward model, or of its adapter; None: not one."""
    base = adapter_base(path, kwargs)
    if base is not None:
        head = _head(_adapter_weights(path, kwargs))
        return n_outputs(base, kwargs) if head is None else len(head)
    trust = bool(kwargs.get("trust_remote_code"))
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust, **hub(kwargs))
    is_classifier = (config.architectures or [""])[0].endswith("ForSequenceClassification")
    return int(config.num_labels) if is_classifier else None


def tokenizer_path(path: str) -> str:
    """Where the tokenizer of a model is: an adapter's folder need not have one, and its base then does."""
    has_none = Path(path).is_dir() and not (Path(path) / "tokenizer_config.json").exists()
    return (has_none and adapter_base(path)) or path


def check_complete(
    where: str,
    model: PreTrainedModel,
    missing: list[str],
    *,
    may_be_new: tuple[str, ...] = (),
    advice: str = "give a complete checkpoint of this kind of model",
) -> None:
    """Check that no weights but those of a fresh head are random, and say which head is new.

    Args:
        where: Class, argument and value, for messages.
        model: The model.
        missing: From :func:`load_pretrained`.
        may_be_new: First parts of the names of weights that may be new.
        advice: What to do.

    Raises:
        ValueError: Names up to five weights.
    """
    lost = [name for name in missing if not name.startswith(may_be_new or ("\0",))]
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise ValueError(
            f"{where}: the checkpoint lacks {', '.join(lost[:5])}{more} of {type(model).__name__}, which would be "
            f"random; {advice}"
        )
    if missing:
        rank_zero_info(f"{where}: new weights with random values, which the checkpoint lacks: {', '.join(missing)}")


def check_causal_lm(where: str, model: PreTrainedModel, missing: list[str]) -> None:
    """Check that a checkpoint is a complete causal LM.

    Raises:
        ValueError: It is a classifier, or weights are missing.
    """
    kinds = [kind for kind in getattr(model.config, "architectures", None) or [] if OTHER_HEADS.search(kind)]
    if kinds:
        head = model.get_output_embeddings()
        names = [name for name, module in model.named_modules() if module is head]
        raise ValueError(
            f"{where}: the checkpoint is a {kinds[0]}, a reward model or classifier, and lacks "
            f"{names[0] if names else 'the language-model head'}.weight; give a causal LM"
        )
    check_complete(where, model, missing)


def check_not_quantized(where: str, model: PreTrainedModel, advice: str) -> None:
    """Check that all weights of a model that is trained in full can be trained.

    Raises:
        ValueError: Its weights are quantised: those layers would stay as they are.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{where}: its weights are quantised, and quantised weights cannot be trained; {advice}")


def _missing(info: dict[str, Any]) -> list[str]:
    return sorted([*info["missing_keys"], *(f"{name} (in this size)" for name, *_ in info["mismatched_keys"])])


def _without_wrappers(
    model: PreTrainedModel, missing: list[str], path: str, kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """Load again with the names that a checkpoint's weights have without their wrappers, if that helps."""
    found: dict[str, Tensor] = {}
    for file in weight_files(path, kwargs):
        loads = file.suffix == ".safetensors"
        found |= load_file(file) if loads else torch.load(file, map_location="cpu", weights_only=True)
    bare = {INSIDE.sub("", name): tensor for name, tensor in found.items()}
    wanted, base = set(model.state_dict()), f"{model.base_model_prefix}."
    votes = Counter(
        prefix
        for name in bare
        for prefix in _prefixes(name)
        if {name[len(prefix) :], base + name[len(prefix) :]} & wanted
        or name[len(prefix) :].removeprefix(base) in wanted
    )
    prefix = max(votes, key=lambda prefix: (votes[prefix], -len(prefix)), default="")
    renamed = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}
    if renamed.keys() == found.keys():
        return model, missing
    auto: Any = type(model)
    again, info = auto.from_pretrained(
        None, config=model.config, state_dict=renamed, output_loading_info=True,
        dtype=kwargs.get("dtype"), ignore_mismatched_sizes=True,
    )  # fmt: skip
    if still := _missing(info):
        return (again, still) if len(still) < len(missing) else (model, missing)
    rank_zero_info(f"{path}: stripped names of wrappers{f' ({prefix!r})' if prefix else ''}; no weight is missing")
    if again.can_generate():
        again.generation_config = model.generation_config
    return again, []


def _prefixes(name: str) -> list[str]:
    """Known wrappers before a name, of which there may be several.

    >>> _prefixes("module.model.lm_head.weight")
    ['', 'module.', 'module.model.']
    """
    found = [""]
    for part in name.split("."):
        if part not in BEFORE:
            break
        found.append(f"{found[-1]}{part}.")
    return found


def _merged(auto: Any, path: str, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, list[str]]:
    """The base model of an adapter, with the adapter added to its weights."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(path, **hub(kwargs))
    if config.is_prompt_learning:
        raise Unusable(f"it holds a {config.peft_type.value} adapter, which cannot be merged; train one like LoRA")
    weights = _adapter_weights(path, kwargs)
    if (head := _head(weights)) is not None:
        if auto is AutoModelForCausalLM:
            raise Unusable("it holds the adapter of a reward model or classifier; give a causal LM's")
        kwargs = {"num_labels": len(head), **kwargs}  # the base, a causal LM, says nothing of it
    base_path = str(adapter_base(path, kwargs))
    try:
        base, missing = load_pretrained(auto, base_path, **kwargs)
    except OSError as error:
        raise Unusable(
            f"it holds an adapter, whose base model {base_path!r} cannot be loaded; correct base_model_name_or_path in "
            f"its adapter_config.json ({first_line(error)})"
        ) from error
    rows = [len(w) for name, w in weights.items() if re.search(r"(embed_tokens|wte|embed_in)\.weight$", name)]
    embeddings: Any = base.get_input_embeddings()
    if rows and rows[0] != len(embeddings.weight):  # tokens were added before it was trained
        base.resize_token_embeddings(rows[0], mean_resizing=False)
    config.task_type, config.inference_mode = None, True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated")  # peft asks for it
        model = PeftModel(base, config)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    lost = sorted(expected.keys() - weights.keys())
    if not lost:
        try:
            set_peft_model_state_dict(model, weights)
        except RuntimeError as error:  # sizes that differ
            reason = message_of(error, 200)
            raise Unusable(f"it holds an adapter that does not fit its base model {base_path!r} ({reason})") from error
    brought = {name.removeprefix("base_model.model.") for name in weights}
    full: Any = model.merge_and_unload()
    full.starting_dtype, full.stored = base.starting_dtype, stored(path, kwargs, base=base.stored)
    if full.can_generate() and (Path(path) / "generation_config.json").exists():
        full.generation_config = GenerationConfig.from_pretrained(path)
    return full, [name for name in missing if name not in brought] + lost


def _adapter_weights(path: str, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    from peft.utils import load_peft_weights

    weights = load_peft_weights(path, device="cpu", **hub(kwargs))
    return {_peft_name(name): tensor for name, tensor in weights.items()}


def _head(weights: dict[str, Tensor]) -> Tensor | None:
    """The scoring head among the weights of an adapter."""
    heads = [name for name in weights if re.search(r"\.(score|classifier)(\.out_proj)?\.weight$", name)]
    return weights[heads[0]] if heads else None


def _peft_name(name: str) -> str:
    """An adapter's name of a weight, without wrappers.

    >>> _peft_name("_orig_mod.base_model.model.lm_head.lora_A.weight")
    'base_model.model.lm_head.lora_A.weight'
    """
    name = INSIDE.sub("", name)
    return name[max(name.find("base_model.model."), 0) :]
