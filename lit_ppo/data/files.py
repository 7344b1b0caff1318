"""Read tables from JSON lines, CSV and TSV files (also gzipped), Parquet files, data sets and rows in memory."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from lit_ppo.data.objects import Data, is_saved, read_with_datasets, table_of
from lit_ppo.data.table import Row, Table, place, short

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".json", *DELIMITERS)
HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+){0,2}(:\S+)?$")
ONLY_FOR_FILES = "column_names is only for CSV and TSV files without a header; leave it out here"
LONGEST_FIELD = 2**31 - 1  # csv's own limit is 128 KiB; a C long holds no more than this on Windows


class _BadPlace(Exception):
    """A line or item of a file that cannot be read."""

    def __init__(self, number: int, problem: str, unit: str = "line") -> None:
        super().__init__(problem)
        self.number, self.unit = number, unit


def read_table(
    where: str,
    path: Data,
    data_root: str | None = None,
    column_names: Sequence[str] | None = None,
    *,
    column: str | None = None,
    max_rows: int | None = None,
) -> Table:
    """Read a file, a hub data set, or rows in memory.

    Args:
        where: Argument to name in messages, such as ``PromptDataModule(path='prompts.jsonl')``.
        path: ``.jsonl``, ``.json`` (lines or one list), ``.csv``, ``.tsv``, each also ``.gz``; with the ``datasets``
            extra ``.parquet``, a folder of ``save_to_disk`` (``folder`` or ``folder:split``) or a hub data set:
            ``owner/name``, ``owner/name/config``, ``owner/name:split`` (default split: ``train``). TSV has no quoting:
            a quotation mark is an ordinary character. Or what :func:`lit_ppo.data.objects.table_of` takes.
        data_root: Folder of relative paths; None: the working directory.
        column_names: Names of the columns of a CSV or TSV file without a header.
        column: Name of the column of rows in memory that are strings or lists.
        max_rows: Read at most this many rows.

    Raises:
        FileNotFoundError: There is no such file; names the resolved path.
        ValueError: The file cannot be read; names file and line.
    """
    if isinstance(path, str | PathLike):
        table = _read_path(where, str(path), data_root, column_names)
        if max_rows is not None and len(table) > max_rows:
            table = table.select(range(max_rows))
    elif column_names is not None:
        raise ValueError(f"{where}: {ONLY_FOR_FILES}")
    else:
        table = table_of(where, path, column, max_rows)
    if not table.rows:
        raise ValueError(f"{where}: {table.source} has no rows; give at least one")
    return table


def _read_path(where: str, path: str, data_root: str | None, column_names: Sequence[str] | None) -> Table:
    file = Path(data_root or ".").joinpath(Path(path).expanduser())
    kind = Path(file.name.removesuffix(".gz")).suffix.lower()
    folder = file if file.is_dir() else file.with_name(file.name.partition(":")[0])
    if column_names is not None and kind not in DELIMITERS:
        raise ValueError(f"{where}: {ONLY_FOR_FILES}")
    if file.is_file() and kind in SUFFIXES:
        return _read_file(where, file, kind, column_names)
    if file.is_file() and kind != ".parquet":
        raise ValueError(
            f"{where}: cannot read a {kind or 'nameless'} file ({file}); "
            f"use one of {', '.join(SUFFIXES)} (also with .gz) or .parquet"
        )
    if is_saved(folder):
        file = folder
    elif not file.is_file() and (kind in (*SUFFIXES, ".parquet") or file.exists() or not HUB_NAME.match(path)):
        problem = "is a folder, not a file" if file.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{where}: {file.resolve()} {problem}; give a file or a folder of save_to_disk, by a path from "
            + (f"data_root={data_root!r}" if data_root else "the working directory")
        )
    rows = read_with_datasets(where, path, file)
    return Table(rows, list(range(1, len(rows) + 1)), str(file) if file.exists() else path, "row", where)


def _read_file(where: str, file: Path, kind: str, column_names: Sequence[str] | None) -> Table:
    unit = "line"
    try:
        text = _decode(file)
        if kind in DELIMITERS:
            numbered = list(_delimited_rows(text, DELIMITERS[kind], column_names))
        elif kind == ".json" and text.lstrip().startswith("["):
            unit = "item"
            numbered = list(enumerate(_parse(text, 1), start=1))
        else:
            lines = enumerate(text.split("\n"), start=1)  # not splitlines: JSON strings may hold other separators
            numbered = [(number, _parse(line, number)) for number, line in lines if line.strip()]
        for number, row in numbered:
            if not isinstance(row, dict):
                problem = f"{short(row)} is not an object with named columns; "
                raise _BadPlace(number, problem + 'write every row as {"column": value, ...}', unit)
    except _BadPlace as bad:
        raise ValueError(f"{where}: {place(file, bad.number, bad.unit)}: {bad}") from bad
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{where}: {file} is not a complete gzip file ({error}); compress it again") from error
    return Table([row for _, row in numbered], [number for number, _ in numbered], str(file), unit, where)


def _decode(file: Path) -> str:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _BadPlace(line, f"not UTF-8 ({error.reason}); save it as UTF-8") from error


def _parse(text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        broken = short(text.split("\n")[error.lineno - 1])
        problem = f"not JSON ({error.msg} at column {error.colno}): {broken}; repair or delete the line"
        raise _BadPlace(first_line + error.lineno - 1, problem) from error


def _delimited_rows(text: str, delimiter: str, column_names: Sequence[str] | None) -> Iterator[tuple[int, Row]]:
    names = list(column_names) if column_names is not None else None
    for line, fields in _tsv_fields(text) if delimiter == "\t" else _csv_fields(text):
        if names is None:
            names = fields
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise _BadPlace(line, f"the header repeats {repeated}; rename columns")
        elif len(fields) != len(names):
            problem = f"{len(fields)} fields, but the columns are {names}; repair the line, or give column_names if "
            raise _BadPlace(line, problem + "the file has no header")
        else:
            yield line, dict(zip(names, fields, strict=True))


def _tsv_fields(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip("\r"):
            yield number, line.removesuffix("\r").split("\t")


def _csv_fields(text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(LONGEST_FIELD)
    start = 1  # a quoted field may span lines: the row's own line is the first of them
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise _BadPlace(start, f"{error}; repair the quoting") from error
    finally:
        csv.field_size_limit(limit)
