"""Tables of rows from JSON lines, CSV and TSV files (also gzipped), Parquet files and hub data sets.

Rows remember where they stand, so that whatever is wrong with one of them can be found with an editor.
"""

import csv
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
READ_HERE = (".jsonl", ".json", *DELIMITERS)
HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+){0,2}(:\S+)?$")
LONGEST_FIELD = 2**31 - 1  # csv's own limit is 128 KiB; a C long holds no more than this on Windows


@dataclass
class Table:
    """Rows of a file or data set, and where each one stands.

    Args:
        rows: One dict a row.
        lines: The line (or row) number of each, counted from 1.
        source: File or data set, as messages name it.
        unit: What ``lines`` counts.

    >>> table = Table([{"prompt": "a"}, {"prompt": "b", "id": 7}], [1, 3], "prompts.jsonl")
    >>> table.columns, table.place(1)
    (['prompt', 'id'], 'prompts.jsonl, line 3')
    """

    rows: list[Row]
    lines: list[int]
    source: str
    unit: str = "line"
    columns: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        """Where a row stands."""
        return f"{self.source}, {self.unit} {self.lines[index]}"

    def select(self, indices: Sequence[int]) -> "Table":
        """The table of these rows; it keeps all columns, also those that none of the rows has."""
        table = Table([self.rows[i] for i in indices], [self.lines[i] for i in indices], self.source, self.unit)
        table.columns = self.columns
        return table


def read_table(where: str, path: str, data_root: str | None = None, column_names: Sequence[str] | None = None) -> Table:
    """Reads a file or a hub data set whole.

    Args:
        where: Argument to name in messages, such as ``PromptDataModule(path='prompts.jsonl')``.
        path: ``.jsonl``, ``.json`` (lines or one list), ``.csv``, ``.tsv``, each also ``.gz``; with the ``datasets``
            extra ``.parquet`` or a hub data set: ``owner/name``, ``owner/name/config``, ``owner/name:split``
            (default split: ``train``). TSV fields are taken as they stand: a quotation mark there is a character.
        data_root: Folder that a relative path starts from; None: the working directory.
        column_names: Names of the columns of a CSV or TSV file that has no header.

    Raises:
        FileNotFoundError: Nothing lies there; names the resolved path.
        ValueError: The file cannot be read; names file and line.
    """
    file = Path(data_root or ".").joinpath(Path(path).expanduser())
    kind = Path(file.name.removesuffix(".gz")).suffix.lower()
    if column_names is not None and kind not in DELIMITERS:
        raise ValueError(f"{where}: column_names is for CSV and TSV files, which may lack a header; leave it out here")
    if file.is_file() and kind in READ_HERE:
        table = _read_file(where, file, kind, column_names)
    elif file.is_file() and kind != ".parquet":
        raise ValueError(
            f"{where}: cannot read a {kind or 'nameless'} file ({file}); "
            f"use one of {', '.join(READ_HERE)} (also with .gz) or .parquet"
        )
    elif file.is_file() or (kind not in (*READ_HERE, ".parquet") and not file.exists() and HUB_NAME.match(path)):
        table = _read_with_datasets(where, path, file)
    else:
        problem = "is a folder, not a file" if file.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{where}: {file.resolve()} {problem}; give a file, by a path from "
            + (f"data_root={data_root!r}" if data_root else "the working directory")
        )
    if not table.rows:
        raise ValueError(f"{where}: {table.source} has no rows; give a file with at least one")
    return table


def _read_file(where: str, file: Path, kind: str, column_names: Sequence[str] | None) -> Table:
    text = _decode(where, file)
    is_list = kind == ".json" and text.lstrip().startswith("[")
    unit = "item" if is_list else "line"
    if kind in DELIMITERS:
        numbered = list(_delimited_rows(where, file, text, DELIMITERS[kind], column_names))
    elif is_list:
        numbered = list(enumerate(_parse(where, file, text, 1), start=1))
    else:
        lines = enumerate(text.split("\n"), start=1)  # not splitlines: JSON strings may hold its other separators
        numbered = [(number, _parse(where, file, line, number)) for number, line in lines if line.strip()]
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: {file}, {unit} {number}: {short(row)} is not an object with named columns; "
                'write every row as {"column": value, ...}'
            )
    return Table([row for _, row in numbered], [number for number, _ in numbered], str(file), unit)


def _decode(where: str, file: Path) -> str:
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{where}: {file} is not a whole gzip file ({error}); compress it again") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{where}: {file}, line {line}: not UTF-8 ({error.reason}); save it as UTF-8") from error


def _parse(where: str, file: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        broken = text.split("\n")[error.lineno - 1]
        raise ValueError(
            f"{where}: {file}, line {line}: not JSON ({error.msg} at column {error.colno}): {short(broken)}; "
            "repair or delete the line"
        ) from error


def _delimited_rows(
    where: str, file: Path, text: str, delimiter: str, column_names: Sequence[str] | None
) -> Iterator[tuple[int, Row]]:
    names = list(column_names) if column_names is not None else None
    for line, fields in _tsv_fields(text) if delimiter == "\t" else _csv_fields(where, file, text):
        if names is None:
            names = fields
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{where}: {file}, line {line}: the header repeats {repeated}; rename columns")
        elif len(fields) != len(names):
            raise ValueError(
                f"{where}: {file}, line {line}: {len(fields)} fields where the columns are {names}; "
                "repair the line, or give column_names if the file has no header"
            )
        else:
            yield line, dict(zip(names, fields, strict=True))


def _tsv_fields(text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip("\r"):
            yield number, line.removesuffix("\r").split("\t")


def _csv_fields(where: str, file: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(LONGEST_FIELD)
    start = 1  # a quoted field may span lines: the row's own line is the first of them
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{where}: {file}, line {start}: {error}; repair the quoting") from error
    finally:
        csv.field_size_limit(limit)


def _read_with_datasets(where: str, path: str, file: Path) -> Table:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        looked = "" if file.is_file() else f" (there is no file {file.resolve()})"
        raise ValueError(
            f"{where}: Parquet files and hub data sets are read with the datasets package, which is not "
            f"installed{looked}; pip install 'lit-ppo[datasets]', or give a JSON lines, CSV or TSV file"
        ) from error
    name, _, split = path.partition(":")
    try:
        if file.is_file():
            data = datasets.load_dataset("parquet", data_files=str(file), split="train")
        else:
            repository, config = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
            data = datasets.load_dataset(repository, config or None, split=split or "train")
    except Exception as error:  # any failure of reader, hub or network: say what was asked for
        looked = "" if file.is_file() else f"there is no file {file.resolve()}, and "
        raise ValueError(f"{where}: {looked}datasets could not load it: {short(str(error))}; check the name") from error
    rows = [dict(row) for row in data]
    return Table(rows, list(range(1, len(rows) + 1)), str(file) if file.is_file() else path, unit="row")


def short(value: Any, length: int = 80) -> str:
    """A value as one line of a message.

    >>> print(short("two   words"), short("x" * 90, length=8))
    'two words' 'xxxxx...'
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return repr(text if len(text) <= length else text[: length - 3] + "...")
