"""The entries of a checkpoint: their kinds, and those that a resumed run needs.

Sharded checkpoints are folders. Their pickles are read as plain data, so that none can run code.
"""

import io
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

NONE = type(None)
NUMBER = (int, float)
KINDS: dict[str, Any] = {  # by dotted name; what a checkpoint lacks has no kind
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "callbacks.*": dict,
    "optimizer_states": list,
    "optimizer_states.*": dict,
    "optimizer_states.*.state": dict,
    "optimizer_states.*.state.*": dict,
    "optimizer_states.*.param_groups": list,
    "optimizer_states.*.param_groups.*": dict,
    "lr_schedulers": list,
    "lr_schedulers.*": dict,
    "lit_ppo": dict,
    "lit_ppo.rollouts": int,
    "lit_ppo.skipped_steps": int,
    "lit_ppo.optimizers": dict,
    "lit_ppo.optimizers.*": dict,
    "lit_ppo.optimizers.*.class": str,
    "lit_ppo.optimizers.*.options": list,
    "lit_ppo.optimizers.*.schedule": (str, NONE),
    "lit_ppo_frozen": dict,
    "lit_ppo_frozen.*": dict,
    "lit_ppo_frozen.*.path": str,
    "lit_ppo_frozen.*.files": dict,
    "optimizers": dict,
    "optimizers.*": dict,
    "lit_ppo_run": dict,
    "lit_ppo_run.config": (dict, NONE),
    "lit_ppo_run.logged": dict,
    "lit_ppo_run.logged.*": NUMBER,
    "lit_ppo_run.steps_logged": int,
    "lit_ppo_run.time": NUMBER,
    "lit_ppo_run.folder": str,
    "lit_ppo_run.id": str,
    "lit_ppo_run.random": list,
    "lit_ppo_run.stopping": bool,
    "lit_ppo_card": dict,
    "lit_ppo_card.card": dict,
    "lit_ppo_card.commands": list,
    "lit_ppo_card.commands.*": str,
    "lit_ppo_card.figures": dict,
    "lit_ppo_card.figures.done": int,
    "lit_ppo_card.figures.series": dict,
    "lit_ppo_card.figures.series.*": list,
    "lit_ppo_card.figures.held_out": dict,
    "lit_ppo_card.figures.held_out.*": list,
}
NEEDED = [f"lit_ppo_card.{name}" for name in ("card", "commands", "figures", "figures.series", "figures.held_out")]
NO_WEIGHT = Tensor()  # stands for one that a checkpoint need not hold
WORDS = {
    dict: "a dictionary",
    list: "a list",
    int: "an integer",
    str: "a string",
    NONE: "None",
    float: "a number",
    bool: "true or false",
}


class EntryError(ValueError):
    """An entry of a checkpoint is missing or of another kind than it was written; the message names it."""


def check_kinds(checkpoint: dict[str, Any]) -> None:
    """Check the kinds of the entries that a checkpoint has.

    Raises:
        EntryError: Names the first entry of another kind.
    """
    version = checkpoint.get("pytorch-lightning_version")
    if isinstance(version, str) and not version[:1].isdigit():
        raise EntryError(f"its entry 'pytorch-lightning_version' must be a version, and is {version[:20]!r}")
    for name, kinds in KINDS.items():
        for place, value in _find(checkpoint, name.split(".")):
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in _all(kinds)):
                expected = " or ".join(dict.fromkeys(WORDS[kind] for kind in _all(kinds)))
                raise EntryError(f"its entry {place!r} must be {expected}, and is {type(value).__name__}")
    check_complete(checkpoint, NEEDED)


def check_complete(checkpoint: dict[str, Any], names: Iterable[str]) -> None:
    """Check that a checkpoint has the entries of these dotted names.

    Raises:
        EntryError: Names those that are missing.
    """
    missing = []
    for name in names:
        *parents, last = name.split(".")
        missing += [f"{place}.{last}".lstrip(".") for place, value in _find(checkpoint, parents) if last not in value]
    if missing:
        raise EntryError(f"it lacks {', '.join(missing[:5])}")


def check_weights(checkpoint: dict[str, Any], names: Iterable[str]) -> None:
    """Check that the weights of these names are tensors.

    Raises:
        EntryError: Names one that is not.
    """
    for name in names:
        value = checkpoint["state_dict"].get(name, NO_WEIGHT)
        if not isinstance(value, Tensor):
            raise EntryError(f"its entry 'state_dict.{name}' must be a tensor, and is {type(value).__name__}")


def check_resumable(trainer: L.Trainer, checkpoint: dict[str, Any], settings: dict[str, Any]) -> None:
    """Check that a checkpoint has all that this trainer restores; say which states start anew.

    Args:
        trainer: About to restore the checkpoint.
        checkpoint: The checkpoint.
        settings: Those of its optimizers, by name.

    Raises:
        EntryError: Names what is missing.
    """
    own = trainer.strategy.lightning_restore_optimizer
    check_complete(checkpoint, ["loops", "callbacks", "lr_schedulers", *(["optimizer_states"] if own else [])])
    check_complete(checkpoint, [f"loops.{name}" for name in trainer._checkpoint_connector._get_loops_state_dict()])
    _check_like(checkpoint["loops"]["fit_loop"], trainer.fit_loop.state_dict(), "loops.fit_loop")
    if own:
        schedules = [name for name, saved in settings.items() if saved.get("schedule")]
        _check_count(checkpoint, "optimizer_states", list(settings))
        _check_count(checkpoint, "lr_schedulers", schedules)
    saved, callbacks = checkpoint["callbacks"], trainer.callbacks  # type: ignore[attr-defined]
    new = [type(each).__name__ for each in callbacks if each.state_key not in saved and each.state_dict()]
    if new:
        rank_zero_info(f"checkpoint {trainer.ckpt_path}: no state of {', '.join(new)}, which starts anew")
    data: Any = getattr(trainer, "datamodule", None)
    if data is not None and data.state_dict():
        _check_data(trainer.ckpt_path, checkpoint, data)


def _check_count(checkpoint: dict[str, Any], name: str, optimizers: list[str]) -> None:
    if len(checkpoint[name]) != len(optimizers):
        raise EntryError(
            f"its entry {name!r} has {len(checkpoint[name])} states, and needs {len(optimizers)} "
            f"({', '.join(optimizers) or 'none'})"
        )


def _check_data(path: Any, checkpoint: dict[str, Any], data: Any) -> None:
    name = type(data).__qualname__
    if name not in checkpoint and getattr(data, "follows_updates", False):
        rank_zero_info(f"checkpoint {path}: no state of {name}, which continues after the updates that it counts")
    elif name not in checkpoint:
        rank_zero_warn(f"checkpoint {path}: no state of {name}, so the data starts from its beginning")
    elif not isinstance(checkpoint[name], dict) or not checkpoint[name]:
        raise EntryError(f"its entry {name!r} must be a dictionary with the state of the data")


def _check_like(found: Any, expected: Any, place: str) -> None:
    """Compare with the state that Lightning would save now: keys, and kinds of counts."""
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            raise EntryError(f"its entry {place!r} must be a dictionary, and is {type(found).__name__}")
        for name, value in expected.items():
            if name not in found:
                raise EntryError(f"it lacks {place}.{name}")
            _check_like(found[name], value, f"{place}.{name}")
    elif isinstance(expected, int) and not isinstance(found, type(expected)):
        raise EntryError(f"its entry {place!r} must be {WORDS[int]}, and is {type(found).__name__}")


def _find(value: Any, parts: list[str], place: str = "") -> Iterator[tuple[str, Any]]:
    """The values under a dotted name, in which ``*`` is any key or place, with their full names."""
    if not parts:
        yield place, value
    elif isinstance(value, dict | list):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, inner in items:
            if parts[0] in ("*", key):
                yield from _find(inner, parts[1:], f"{place}.{key}".lstrip("."))


def _all(kinds: Any) -> tuple[Any, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)


# what torch puts into the metadata; each makes a value out of plain ones
METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
    "collections": {"OrderedDict"},
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"Weights only load failed: Unsupported global {module}.{name}")
        return super().find_class(module, name)


class PlainReader(FileSystemReader):
    """Reads the metadata of a sharded checkpoint, which torch would unpickle, as plain data."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _read_metadata(Path(self._get_metadata_path(kwargs.get("rank"))))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _PlainPlanner(_EmptyStateDictLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        _check_plain(value)
        super().load_bytes(read_item, value)


def load_full(folder: Path) -> dict[str, Any]:
    """The full weights of a sharded checkpoint, as ``state_dict``."""
    weights: dict[str, Any] = {}
    planner = _PlainPlanner(keys={"state_dict"})  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad():
            _load_state_dict(weights, storage_reader=PlainReader(folder), planner=planner, no_dist=True)
    except CheckpointException as error:  # not an Exception
        raise next(iter(error.failures.values()))[0] from error
    return weights


def check_plain(folder: Path) -> None:
    """Check a sharded checkpoint before torch reads it, which would unpickle metadata and all that is no tensor.

    Raises:
        UnpicklingError: It holds more than plain data.
    """
    for file in folder.glob("*.metadata"):
        metadata = _read_metadata(file)
        for index, place in (metadata.storage_data or {}).items():
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                with (folder / place.relative_path).open("rb") as stored:
                    stored.seek(place.offset)
                    _check_plain(io.BytesIO(stored.read(place.length)))


def _read_metadata(file: Path) -> Metadata:
    with file.open("rb") as stored:
        metadata = _MetadataUnpickler(stored).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError("the metadata of a sharded checkpoint is of another kind")
    for place in (metadata.storage_data or {}).values():
        if Path(place.relative_path).name != place.relative_path:
            raise pickle.UnpicklingError(f"a shard lies outside of the folder, at {place.relative_path!r}")
    return metadata


def _check_plain(stored: io.BytesIO) -> None:
    torch.load(stored, map_location="cpu", weights_only=True)
    stored.seek(0)
