"""Write a trained model so that it is used as the checkpoint was that it started from; push it to the hub."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import PushToHubMixin

from lit_ppo.models.stored import Dtype
from lit_ppo.shown import first_line, message_of
from lit_ppo.validate import one_of, refuse

GENERATION = "generation_config.json"


def checked_dtype(owner: object, dtype: Any) -> Dtype | None:
    """The argument ``dtype`` of an export: a floating-point type of torch or its name, or None."""
    name = dtype if dtype is None else str(dtype).removeprefix("torch.")
    return None if name is None else one_of(owner, "dtype", name, get_args(Dtype))


def checked_repository(owner: object, name: Any) -> str | None:
    """The argument ``push_to_hub``: the name of a repository on the hub, or None."""
    try:
        validate_repo_id(name)
        if str(name).lower() in ("true", "false"):
            raise HFValidationError("it is no name")
    except HFValidationError as error:
        refuse(
            owner,
            "push_to_hub",
            name,
            f"give the repository's name on the hub, such as me/my-model ({message_of(error)})",
        )
    return name  # type: ignore[no-any-return]


def save_model(
    model: PreTrainedModel,
    weights: dict[str, Tensor] | None,
    dirpath: str | Path,
    *,
    dtype: torch.dtype,
    stops: int | list[int] | None = None,
) -> None:
    """Write weights, config and, for a causal LM, the generation config that its checkpoint had.

    Args:
        model: The model.
        weights: Its full weights, where it is sharded; None: those of the model.
        dirpath: Folder; made if it does not exist.
        dtype: Of the written weights. Weights that transformers always loads in float32 keep their own.
        stops: Tokens that end a text, for the generation config.
    """
    if model.dtype != dtype:
        weights = _cast(model, model.state_dict() if weights is None else weights, dtype)
    model.save_pretrained(str(dirpath), state_dict=weights)
    if model.dtype != dtype:
        config: Any = deepcopy(model.config)
        config.dtype = dtype
        config.save_pretrained(str(dirpath))
    if model.can_generate():
        _set_stops(Path(dirpath), stops)


def save_generation_config(model: PreTrainedModel, dirpath: str | Path, stops: int | list[int] | None) -> None:
    """Write the generation config that a causal LM's checkpoint had, with the stop tokens of training."""
    model.generation_config.save_pretrained(str(dirpath))
    _set_stops(Path(dirpath), stops)


def _set_stops(folder: Path, stops: int | list[int] | None) -> None:
    """Set the stop tokens in the file: transformers refuses to save a changed config whose fields contradict."""
    if stops is None:
        return
    fields = json.loads((folder / GENERATION).read_text(encoding="utf-8")) | {"eos_token_id": stops}
    (folder / GENERATION).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _cast(model: PreTrainedModel, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in another dtype, on the CPU; tied weights stay tied."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    done: dict[Any, Tensor] = {}

    def cast(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or any(re.search(rf"(^|\.){part}(\.|$)", name) for part in kept):
            return tensor
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        return done.setdefault(place, tensor.detach().to("cpu", dtype))

    return {name: cast(name, tensor) for name, tensor in weights.items()}


def push(where: str, folder: str | Path, repository: str, private: bool | None = None) -> None:
    """Push a model's folder to the hub, as ``transformers`` does, in one commit.

    Args:
        where: Argument to name in messages.
        folder: Folder of the model.
        repository: Name on the hub; it is made if it does not exist.
        private: Whether a new one is private.

    Raises:
        RuntimeError: It cannot be pushed.
    """
    try:
        name = huggingface_hub.HfApi().create_repo(repository, private=private, exist_ok=True).repo_id
        done = PushToHubMixin()._upload_modified_files(str(folder), name, {}, commit_message="Upload model")
    except Exception as error:
        raise RuntimeError(
            f"{where}: not pushed ({type(error).__name__}: {first_line(error)}); the model is in "
            f"{folder}; push it with: hf upload {repository} {folder}"
        ) from error
    rank_zero_info(f"Pushed {folder} to the hub: {getattr(done, 'commit_url', name)}")
