"""Read tables from JSON lines, CSV and TSV files (also gzipped), Parquet files, data sets and rows in memory."""

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

from lit_ppo.data.lines import BLOCK, JSONList, delimited_rows, json_lines
from lit_ppo.data.objects import Data, is_saved, read_with_datasets, table_of
from lit_ppo.data.table import ROW_MB, Intake, Row, Table, short
from lit_ppo.shown import message_of

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".json", *DELIMITERS)
HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+){0,2}(:\S+)?$")
ONLY_FOR_FILES = "column_names is only for CSV and TSV files without a header; leave it out here"


def read_table(
    where: str,
    path: Data,
    data_root: str | None = None,
    column_names: Sequence[str] | None = None,
    *,
    column: str | None = None,
    max_rows: int | None = None,
    max_row_mb: float = ROW_MB,
    may_be_empty: bool = False,
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
        max_row_mb: MiB of the longest row, see :class:`lit_ppo.data.table.Intake`. What a file takes in memory while it
            is read depends on this and on the rows that it has, not on how it is content.
        may_be_empty: Return a table without rows where others raise.

    Raises:
        FileNotFoundError: There is no such file; names the resolved path.
        ValueError: The file cannot be read; names file and line.
    """
    if isinstance(path, str | PathLike):
        table = _read_path(where, str(path), data_root, column_names, max_rows, max_row_mb)
    elif column_names is not None:
        raise ValueError(f"{where}: {ONLY_FOR_FILES}")
    else:
        table = table_of(where, path, column, max_rows, max_row_mb, data_root)
    if not table.rows and not may_be_empty:
        raise ValueError(f"{where}: {table.source} has no rows; give at least one")
    return table


def _mode(where: str, file: Path) -> int:
    """The kind of a file; 0: there is none.

    Raises:
        ValueError: It cannot be looked at, or is a pipe or device.
    """
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError) as error:  # a loop of links, no permission, too long a name, a NUL in it
        raise ValueError(f"{where}: {_cannot_read(file, error)}") from error
    if not (S_ISREG(mode) or S_ISDIR(mode)):
        raise ValueError(f"{where}: {file} is a pipe, socket or device; write the rows to a file and give that")
    return mode


def _cannot_read(file: Path, error: Exception) -> str:
    problem = getattr(error, "strerror", None) or error
    return f"{short(str(file), 300)[1:-1]} cannot be read ({problem}); check path and permissions"


def _read_path(
    where: str, path: str, data_root: str | None, names: Sequence[str] | None, max_rows: int | None, max_row_mb: float
) -> Table:
    try:
        file = Path(data_root or ".").joinpath(Path(path).expanduser())
    except RuntimeError as error:  # there is no such user
        raise ValueError(f"{where}: {error}; give the path without ~") from error
    mode = _mode(where, file)
    kind = Path(file.name.removesuffix(".gz")).suffix.lower()
    folder = file if S_ISDIR(mode) else file.with_name(file.name.partition(":")[0])
    if names is not None and kind not in DELIMITERS:
        raise ValueError(f"{where}: {ONLY_FOR_FILES}")
    if S_ISREG(mode) and kind in SUFFIXES:
        return _read_file(file, kind, names, max_rows, Intake(where, str(file), max_row_mb, "line"))
    if S_ISREG(mode) and kind != ".parquet":
        raise ValueError(
            f"{where}: cannot read a {kind or 'nameless'} file ({file}); "
            f"use one of {', '.join(SUFFIXES)} (also with .gz) or .parquet"
        )
    if is_saved(folder):
        file = folder
    elif not S_ISREG(mode) and (kind in (*SUFFIXES, ".parquet") or mode or not HUB_NAME.match(path)):
        problem = "is a folder, not a file" if mode else "does not exist"
        raise FileNotFoundError(
            f"{where}: {file.resolve()} {problem}; give a file or a folder of save_to_disk, by a path from "
            + (f"data_root={data_root!r}" if data_root else "the working directory")
        )
    rows = read_with_datasets(where, path, file, max_rows, max_row_mb)
    return Table(rows, list(range(1, len(rows) + 1)), str(file) if file.exists() else path, "row", where)


def _read_file(file: Path, kind: str, names: Sequence[str] | None, max_rows: int | None, intake: Intake) -> Table:
    rows: list[Row] = []
    lines: list[int] = []
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as content:
            if kind == ".json" and content.peek(BLOCK).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                intake.unit = "item"
                numbered: Iterator[tuple[int, Any]] = JSONList(content, intake).items()
            elif kind in DELIMITERS:
                numbered = delimited_rows(content, DELIMITERS[kind], names, intake)
            else:
                numbered = json_lines(content, intake)
            for number, row in islice(numbered, max_rows):
                if not isinstance(row, dict):
                    problem = f"{short(row)} is not an object with named columns; "
                    intake.refuse(number, problem + 'write every row as {"column": value, ...}')
                rows.append(row)
                lines.append(number)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        after = f" (it breaks off after {intake.unit} {lines[-1]})" if lines else ""
        problem = f"{file} is not a complete gzip file ({message_of(error)}){after}; compress it again"
        raise ValueError(f"{intake.where}: {problem}") from error
    except OSError as error:
        raise ValueError(f"{intake.where}: {_cannot_read(file, error)}") from error
    return Table(rows, lines, str(file), intake.unit, intake.where)
