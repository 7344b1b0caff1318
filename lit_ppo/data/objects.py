"""Rows of what Python code holds: data sets, lists, columns, streams; and of the datasets package's own files."""

import importlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lit_ppo.data.table import DEPTH, FILE_ROWS, ROW_MB, Intake, Row, Table, short
from lit_ppo.shown import message_of, written
from lit_ppo.validate import path, refuse

Data = str | Iterable[Any]
"""A file, a folder or a hub name; or rows: a data set, a list, a mapping of columns, a stream."""

ROWS_AT_ONCE = 16  # of a Parquet file, whose values may be long
FILE_NAME = re.compile(r"\S+\.((jsonl|json|csv|tsv)(\.gz)?|parquet)", re.IGNORECASE)
SAVED = ("state.json", "dataset_dict.json")  # in a folder that save_to_disk has written


def checked_data(owner: object, name: str, value: Any) -> Data:
    """An argument that gives rows: a path or name, or an object that holds rows in an order.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(value, str | PathLike):
        return path(owner, name, value)
    rows = isinstance(value, Iterable) or (hasattr(value, "__getitem__") and hasattr(value, "__len__"))
    if not rows or isinstance(value, bytes | bytearray | set | frozenset | type):
        refuse(owner, name, value, "holds no rows in an order; give a path, a data set, or a list of rows")
    return value  # type: ignore[no-any-return]


def shown(value: Any) -> str:
    """An argument for messages: rows by their type and number."""
    if value is None or isinstance(value, str | int | float | Path):
        return written(value)
    count = _length(value)
    return f"<{type(value).__name__}{'' if count is None else f' of {count}'}>"


def table_of(
    where: str,
    data: Any,
    column: str | None = None,
    max_rows: int | None = None,
    max_row_mb: float = ROW_MB,
    data_root: str | None = None,
) -> Table:
    """A table of the rows that an object holds.

    Args:
        where: Argument to name in messages.
        data: A ``datasets.Dataset`` or a dict of them (its split ``train``); any other data set or list of rows, of
            strings or of lists of chat messages; a mapping of columns or a ``DataFrame``; an iterable.
        column: Name of the column of rows that are strings or lists; None: each row must be a mapping.
        max_rows: Take at most this many rows; required where the data have no length.
        max_row_mb: MiB of the longest row, see :class:`lit_ppo.data.table.Intake`.
        data_root: Folder of relative paths, to tell names of files from text.

    Raises:
        ValueError: It is something else, has no rows, has no length, lists files, or a row is too large.
    """
    data = _split(where, data, None)
    source = shown(data)
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a DataFrame iterates over the names of its columns
        data = data.to_dict("records")
    elif isinstance(data, Mapping):
        data = _rows_of_columns(where, data)
    if isinstance(data, bytes) or not (hasattr(data, "__iter__") or (_length(data) and hasattr(data, "__getitem__"))):
        raise ValueError(f"{where}: {source} holds no rows; give a path, a data set, or a list of rows")
    if _length(data) is None and max_rows is None:
        raise ValueError(
            f"{where}: the stream {source} does not say how many rows it has; give max_rows, the number to read"
        )
    # some data sets have no iterator, and the one that Python then makes ends at an IndexError, which they do not raise
    items = data if hasattr(data, "__iter__") else (data[i] for i in range(_length(data) or 0))
    intake = Intake(where, source, max_row_mb)
    rows = []
    for number, item in enumerate(itertools.islice(items, max_rows), start=1):
        if isinstance(item, str | PathLike) and _is_file_name(str(item), number == 1, data_root):
            problem = f"row {number} is {short(str(item))}, the name of a file; give one file: join the files, or read "
            text = f"; where it is a text, write it as {{{column!r}: ...}}" if column else ""
            raise ValueError(f"{where}: {problem}them in Python and give their rows{text}")
        rows.append(_row(where, number, item, column))
        intake.row(number, rows[-1])
    return Table(rows, list(range(1, len(rows) + 1)), source, "row", where)


def _length(data: Any) -> int | None:
    """The number of rows; of a stream, that of its ``take``."""
    try:
        return len(data)
    except TypeError:
        first: Any = getattr(data, "_ex_iterable", None)  # of datasets.IterableDataset
        return int(first.n) if type(first).__name__ == "TakeExamplesIterable" else None


def _is_file_name(text: str, look: bool, data_root: str | None) -> bool:
    """Whether a row is the name of a file or data set: it ends as one, or there is one and we ``look``."""
    if FILE_NAME.fullmatch(text):
        return True
    path = os.path.join(data_root or "", os.path.expanduser(text)) if look and len(text) < 1000 else ""
    return os.path.isfile(path) or (os.path.isdir(path) and is_saved(Path(path)))


def _row(where: str, number: int, row: Any, column: str | None) -> Row:
    if isinstance(row, Mapping):
        return {name: messages_as_lists(value) for name, value in row.items()}
    row = messages_as_lists(row)
    if column is not None and isinstance(row, str | list):
        return {column: row}
    refuse_row = f"{where}: row {number} is {type(row).__name__} {short(row)}, not a mapping of named columns; "
    raise ValueError(refuse_row + 'write every row as {"column": value, ...}')


def messages_as_lists(value: Any) -> Any:
    """Messages, tools and other mappings in a tuple or an array as a list of dicts, and any other value as it is.

    Parquet files read by pandas and data sets in the format "numpy" have arrays.

    >>> messages_as_lists(({"role": "user", "content": "a film"},)), messages_as_lists((1, 2))
    ([{'role': 'user', 'content': 'a film'}], (1, 2))
    """
    if not isinstance(value, list | tuple | np.ndarray) or getattr(value, "ndim", 1) != 1:
        return value
    return _simple(value) if len(value) and all(isinstance(part, Mapping) for part in value) else value


def _simple(value: Any, depth: int = 0) -> Any:
    """Of the types of JSON; deeper than allowed, as it is."""
    if depth > DEPTH:
        return value
    if isinstance(value, Mapping):
        return {name: _simple(part, depth + 1) for name, part in value.items()}
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return [_simple(part, depth + 1) for part in value]
    return value.item() if isinstance(value, np.generic | np.ndarray) else value


def _rows_of_columns(where: str, columns: Mapping[str, Any]) -> list[Row]:
    lengths = {name: None if isinstance(values, str) else _length(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"{where}: a mapping must have columns of one length, but they have {lengths}; give rows")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def has_splits(data: Any) -> bool:
    """Whether this is a dict of data sets, as ``load_dataset`` returns it without a split."""
    return isinstance(data, Mapping) and any(hasattr(value, "column_names") for value in data.values())


def _split(where: str, data: Any, split: str | None) -> Any:
    """One of the splits of a dict of data sets; anything else as it is."""
    if not has_splits(data):
        if split is not None:
            raise ValueError(f"{where}: this is one data set without splits; leave out ':{split}'")
        return data
    if (split or "train") not in data:
        problem = f"has the splits {', '.join(map(str, data))}, but no {split or 'train'!r}; "
        raise ValueError(f"{where}: {problem}name one (path:split), or give its data set")
    return data[split or "train"]


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` has written this folder."""
    return any((folder / name).is_file() for name in SAVED)


def read_with_datasets(
    where: str, path: str, file: Path, max_rows: int | None = None, max_row_mb: float = ROW_MB
) -> list[Row]:
    """Rows of a Parquet file, a folder of ``save_to_disk`` or a hub data set.

    Args:
        where: Argument to name in messages.
        path: As given, perhaps with ``:split``.
        file: The path without the split, resolved.
        max_rows: Read at most this many rows.
        max_row_mb: MiB of the longest row, see :class:`lit_ppo.data.table.Intake`.

    Raises:
        ValueError: datasets is not installed, or cannot load it, or a row is too large.
    """
    missing = "" if file.exists() else f"there is no file or folder {file.resolve()}"
    reason = f" ({missing})" if missing else ""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"{where}: Parquet files, hub data sets and folders of save_to_disk need the datasets package, which is "
            f"not installed{reason}; pip install 'lit-ppo[datasets]', or give a JSON lines, CSV or TSV file"
        ) from error
    name, _, split = path.partition(":")
    intake = Intake(where, path if missing else str(file), max_row_mb)

    def loaded() -> Iterator[Any]:
        if file.is_dir():
            yield from _split(where, datasets.load_from_disk(str(file)), split or None)
        elif file.is_file():
            _check_unpacked(intake, file)
            options = {"data_files": str(file), "split": "train", "streaming": True, "batch_size": ROWS_AT_ONCE}
            yield from datasets.load_dataset("parquet", **options)  # without a copy of all rows on the disk
        else:
            rank_zero_info(f"{where}: {missing}, so it is looked up on the Hugging Face hub")
            repository, config = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
            yield from datasets.load_dataset(repository, config or None, split=split or "train")

    rows: list[Row] = []
    try:
        for row in itertools.islice(loaded(), max_rows):
            rows.append(_row(where, len(rows) + 1, row, None))
            intake.row(len(rows), rows[-1])
    except Exception as error:  # of the reader, the hub or the network
        if type(error) is ValueError and str(error).startswith(f"{where}: "):  # ours
            raise
        what = f"{missing}, and " if missing else f"{file}{f', after row {len(rows)}' if rows else ''}: "
        remedy = "check the name" if missing else "write it again"
        raise ValueError(f"{where}: {what}datasets could not load it: {short(message_of(error))}; {remedy}") from error
    return rows


def _check_unpacked(intake: Intake, file: Path) -> None:
    """Check the size of a Parquet file's columns before they are unpacked."""
    metadata: Any = importlib.import_module("pyarrow.parquet").ParquetFile(file).metadata
    limit = FILE_ROWS * intake.row_limit
    unpacked = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if unpacked > limit:
        problem = (
            f"{unpacked >> 20} MiB when unpacked, more than {limit >> 20}; give a smaller file, or raise max_row_mb"
        )
        raise ValueError(f"{intake.where}: {file}: {problem} (the limit is {FILE_ROWS} times it)")
