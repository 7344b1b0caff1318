"""Sharded checkpoints, which are folders: their pickles are read as plain data, so that none can run code."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

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
