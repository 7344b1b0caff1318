"""The files of a checkpoint, in a folder or from the hub."""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from lit_ppo.parallel.files import CHECKSUMS, DamagedFileError, verify_model
from lit_ppo.validate import boolean, mapping, refuse

HUB = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
Dtype = Literal["float32", "bfloat16", "float16"]
NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of safetensors


class Unusable(ValueError):
    """What a folder holds cannot be used. The message goes behind class, argument and value, and says what to do."""


@contextmanager
def no_pickled_code() -> Iterator[None]:
    """Say in our own words that weights are refused: torch's tell how to load them all the same."""
    try:
        yield
    except pickle.UnpicklingError as error:
        if re.search("Unsupported (global|class)|GLOBAL|was not an allowed global|Trying to", str(error)):
            raise Unusable(
                "its weights (a .bin file) are a pickle that holds more than tensors, and loading them would run code; "
                "give the model with weights in model.safetensors, or from a source that has tensors only"
            ) from error
        raise Unusable("its weights (a .bin file) are damaged, or no weights; get the file again") from error


def hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that say where on the hub a model is."""
    return {name: value for name, value in kwargs.items() if name in HUB}


def checked_model_kwargs(owner: object, kwargs: Any, *taken: str) -> dict[str, Any]:
    """The argument ``model_kwargs``.

    Args:
        owner: The object with the argument, for messages.
        kwargs: Arguments of ``from_pretrained``, or None.
        *taken: Names that the owner sets itself.

    Raises:
        ValueError: It is no mapping of names, sets what is not the user's to set, or its consent is neither yes nor no.
    """
    given = mapping(owner, "model_kwargs", kwargs)
    for name in given:
        if name in (*taken, "output_loading_info", "state_dict"):
            refuse(owner, "model_kwargs", given, f"{name} is not set here; leave it out")
    if "trust_remote_code" in given:  # any other text than an empty one would be a yes
        boolean(owner, "model_kwargs.trust_remote_code", given["trust_remote_code"])
    return given


def weight_files(path: str, kwargs: dict[str, Any]) -> list[Path]:
    """The files with the weights of a folder or a hub name."""
    folder = Path(path) if Path(path).is_dir() else Path(str(cached_file(path, "config.json", **hub(kwargs)))).parent
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def stored_dtype(path: str, kwargs: dict[str, Any]) -> torch.dtype:
    """What ``from_pretrained(dtype="auto")`` loads: the dtype in the config, else that of the first stored weights."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=kwargs["trust_remote_code"], **hub(kwargs))
    named = config.dtype or config.get_text_config().dtype
    if named is not None:
        return getattr(torch, named) if isinstance(named, str) else named  # type: ignore[no-any-return]
    for file in weight_files(path, kwargs):
        for dtype in _dtypes(file):
            if dtype is not None:
                return dtype
    return torch.float32


def _dtypes(file: Path) -> list[torch.dtype | None]:
    """The floating-point dtypes in a file; None for other tensors."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as stored:
            return [NAMES.get(stored.get_slice(name).get_dtype()) for name in stored.keys()]  # noqa: SIM118
    weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return [weight.dtype if weight.is_floating_point() else None for weight in weights.values()]


def check_files(path: str, kwargs: dict[str, Any]) -> None:
    """Compare the files of a folder that an export wrote with their checksums.

    Raises:
        Unusable: A file of weights differs.
    """
    try:
        verify_model(Path(path, kwargs.get("subfolder") or ""))
    except DamagedFileError as error:
        raise Unusable(f"{error}; export the model again, or delete {CHECKSUMS} if you changed the file") from error
