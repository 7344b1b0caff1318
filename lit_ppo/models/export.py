"""Write a trained model so that it is used as the checkpoint was that it started from; push it to the hub."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
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
from lit_ppo.parallel.files import FILES, is_temporary
from lit_ppo.shown import first_line, message_of
from lit_ppo.validate import one_of, refuse

GENERATION = "generation_config.json"
MODEL_FILE = re.compile(
    r"README\.md|(adapter_|generation_|tokenizer_)?config\.json|(adapter_)?model(-\d+-of-\d+)?\.safetensors"
    r"|model\.safetensors\.index\.json|tokenizer\.(json|model)|special_tokens_map\.json|added_tokens\.json"
    r"|chat_template\.jinja|vocab\.(json|txt)|merges\.txt|checksums\.json"
)
EDITABLE = 2**20  # bytes


def checked_dtype(owner: object, dtype: Any) -> Dtype | None:
    """The argument ``dtype`` of an export: a floating-point type of torch or its name, or None."""
    name = str(dtype) if isinstance(dtype, torch.dtype) else dtype
    name = name.removeprefix("torch.") if isinstance(name, str) else name
    return None if name is None else one_of(owner, "dtype", name, get_args(Dtype))


def checked_repository(owner: object, name: Any) -> str | None:
    """The argument ``push_to_hub``: the name of a repository on the hub, or None."""
    if name is None:
        return None
    try:
        validate_repo_id(name)
        if str(name).lower() in ("true", "false"):
            raise HFValidationError("it is no name")
    except Exception as error:  # whatever the name is
        reason = message_of(error) if isinstance(error, HFValidationError) else "it is no name"
        refuse(owner, "push_to_hub", name, f"give the repository's name on the hub, such as me/my-model ({reason})")
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
    share_weights(Path(dirpath))
    if model.can_generate():
        _set_stops(Path(dirpath), stops)


def share_weights(folder: Path) -> None:
    """Give the files of weights the permissions of their neighbours: safetensors lets only their owner read them."""
    configs = [folder / name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]
    for file in folder.glob("*.safetensors") if configs else ():
        shutil.copymode(configs[0], file)


def list_files(folder: str | Path, *, all_files: bool = False) -> None:
    """Write down what an export has written, so that the next one may replace it.

    Args:
        folder: Of the model.
        all_files: All files in it were written by the export; else those with names of a model's files.
    """
    found = (name for name in sorted(file_names(Path(folder))) if name != FILES)
    names = [name for name in found if all_files or MODEL_FILE.fullmatch(name)]
    text = json.dumps({"files": {name: file_digest(Path(folder, name)) for name in names}}, indent=1)
    Path(folder, FILES).write_text(text + "\n", encoding="utf-8")


def file_names(folder: Path, prefix: str = "") -> Iterator[str]:
    """Files, links and empty folders, below a folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and any(path.iterdir()):
            yield from () if is_temporary(path) else file_names(path, f"{prefix}{path.name}/")
        elif not is_temporary(path):
            yield prefix + path.name


def file_digest(file: Path) -> str:
    """The digest of what a person might edit, such as the model card; empty for a large file."""
    small = file.is_file() and file.stat().st_size <= EDITABLE
    return hashlib.sha256(file.read_bytes()).hexdigest() if small else ""


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
