"""The files of a checkpoint, in a folder or from the hub."""

import hashlib
import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from lit_ppo.parallel.files import CHECKSUMS, DamagedFileError, verify_model
from lit_ppo.validate import boolean, mapping, refuse

HUB = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
FROZEN_MODELS = "lit_ppo_frozen"  # key of a checkpoint: where the models were loaded from that it does not hold
Dtype = Literal["float32", "bfloat16", "float16"]
SAMPLES, SAMPLE = 256, 4096  # places of a large file that are read to tell it from another, and bytes at each
UNREAD = ("_name_or_path", "transformers_version", "base_model_name_or_path")  # in configs; they change no output
NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of safetensors


class Unusable(ValueError):
    """What a folder holds cannot be used. The message goes behind class, argument and value, and says what to do."""


class Stored(TypedDict):
    """Where a model was loaded from."""

    path: str
    files: dict[str, str]  # name -> size and digest; of a hub name its commit; empty if that is not known


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
    is_local = Path(path).is_dir()
    folder = _folder(path, kwargs) if is_local else Path(str(cached_file(path, "config.json", **hub(kwargs)))).parent
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
        verify_model(_folder(path, kwargs))
    except DamagedFileError as error:
        raise Unusable(f"{error}; export the model again, or delete {CHECKSUMS} if you changed the file") from error


def stored(path: str, kwargs: dict[str, Any], config: Any = None, base: Any = None) -> Stored:
    """What tells the files of a model from those of another one. It takes milliseconds, however large they are.

    Args:
        path: Local folder or hub name.
        kwargs: Of ``from_pretrained``.
        config: The loaded model's; it knows the commit of a hub name.
        base: The same of the base model of an adapter.
    """
    of_base = {} if base is None else {f"base/{name}": digest for name, digest in base["files"].items()}
    if not Path(path).is_dir():
        commit = getattr(config, "_commit_hash", None)
        return {"path": path, "files": of_base if commit is None else {"commit": str(commit), **of_base}}
    folder = _folder(path, kwargs)
    weights = weight_files(path, kwargs) or sorted(folder.glob("adapter_model.*"))
    configs = [file for name in ("config.json", "adapter_config.json") if (file := folder / name).is_file()]
    digests = [(file, _config_digest(file)) for file in configs] + [(file, sampled_digest(file)) for file in weights]
    return {"path": path, "files": {file.name: digest for file, digest in digests} | of_base}


def sampled_digest(file: Path) -> str:
    """Size of a file and digest of its bytes: of all in a file of up to a megabyte, else of evenly spaced blocks.

    Training changes almost all weights, so it changes these blocks. The last one holds the head of a reward model.
    """
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        if size <= SAMPLES * SAMPLE:
            digest.update(stream.read())
        else:
            for place in range(SAMPLES):
                stream.seek(place * (size - SAMPLE) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE))
    return f"{size} {digest.hexdigest()}"


def _config_digest(file: Path) -> str:
    config = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in UNREAD}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def check_same_files(owner: object, checkpoint: Any, started: dict[str, Stored], now: dict[str, Stored]) -> None:
    """Check that models which no checkpoint holds are those that a run started with.

    Args:
        owner: The object that has loaded the models, for messages.
        checkpoint: Path of the run's checkpoint, for messages.
        started: Where the run's models were loaded from, by argument.
        now: The same of the models that are loaded now.

    Raises:
        ValueError: The files of one differ.
    """
    for argument in sorted(started.keys() & now.keys()):
        before, after = started[argument]["files"], now[argument]["files"]
        changed = sorted(name for name in before | after if before.get(name) != after.get(name))
        if before and after and changed:
            refuse(
                owner, argument, now[argument]["path"],
                f"not the model that the run of {checkpoint} started with, from {started[argument]['path']!r}, and "
                f"checkpoints do not hold it; other content: {', '.join(changed[:5])}; restore these files, or start a "
                "new run, without --ckpt_path",
            )  # fmt: skip


def _folder(path: str, kwargs: dict[str, Any]) -> Path:
    return Path(path, kwargs.get("subfolder") or "")
