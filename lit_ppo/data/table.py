"""A table of rows that knows where each row stands, so that every error names file and line."""

import json
import re
import reprlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from lightning.pytorch.utilities import rank_zero_info

from lit_ppo.digest import unit_hash

Row = dict[str, Any]
Message = dict[str, Any]

ROW_MB = 16.0
"""Default of ``max_row_mb``: MiB of the longest row."""

FILE_ROWS = 256
"""The rows of a file or data set may take as many MiB as this number of the longest rows."""

ROW_COSTS = 512  # bytes in memory that a row takes beside its values
DEPTH = 100  # of nested values; later steps copy, compare and save them by recursion
HUGE = 10**4300  # Python writes no integer with more digits
SECONDS_BETWEEN_LOGS = 3.0
CHAT = '[{"role": "user", "content": "..."}, ...]'
WRITTEN_CHAT = re.compile(  # messages as text, in JSON or Python, as CSV files have them
    r"""\s*((array\()?[\[(]\s*\{|\{(?=\s*["'](role|content)["']))"""
    r"""(?=.*["'](role|from)["']\s*:)(?=.*["'](content|value)["']\s*:).*[]})]\s*""", re.DOTALL
)  # fmt: skip


@dataclass
class Table:
    """Rows of a file or data set.

    Args:
        rows: One dict per row.
        lines: The line (or row) number of each row, counted from 1.
        source: File or data set, for messages.
        unit: What ``lines`` counts.
        where: The argument that named the source, for messages.

    >>> table = Table([{"prompt": "a"}, {"prompt": "b", "id": 7}], [1, 3], "prompts.jsonl")
    >>> table.columns, table.place(1)
    (['prompt', 'id'], 'prompts.jsonl, line 3')
    """

    rows: list[Row]
    lines: list[int]
    source: str
    unit: str = "line"
    where: str = "read_table"
    columns: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        """The place of a row."""
        return place(self.source, self.lines[index], self.unit)

    def refuse(self, index: int, problem: str) -> NoReturn:
        """Raise the error of a row.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{self.where}: {self.place(index)}: {problem}")

    def require(self, columns: Sequence[str]) -> None:
        """Check that the table has these columns.

        Raises:
            ValueError: One is missing; names the existing ones.
        """
        for column in columns:
            if column not in self.columns:
                raise ValueError(
                    f"{self.where}: {self.source} has no column {column!r}, only {listed(self.columns)}; "
                    "name one of these, or give column_names for a CSV or TSV file without a header"
                )

    def cell(self, index: int, column: str) -> Any:
        """The value of a column in one row.

        Raises:
            ValueError: The row has no value for it.
        """
        self.require([column])
        value = self.rows[index].get(column)
        if value is None:
            given = [name for name, other in self.rows[index].items() if other is not None]
            self.refuse(index, f"no value for column {column!r}, only for {listed(given)}; add it or delete the row")
        return value

    def text(self, index: int, column: str) -> str:
        """The text of a column in one row.

        Raises:
            ValueError: It is missing, empty or not text.
        """
        value = self.cell(index, column)
        if not isinstance(value, str):
            advice = "write it as a string" if isinstance(value, int | float) else f"give text, or a chat as {CHAT}"
            self.refuse(index, f"column {column!r} holds {type(value).__name__} {short(value)}, not text; {advice}")
        if not value.strip():
            self.refuse(index, f"empty {column!r}; fill it in or delete the row")
        if WRITTEN_CHAT.fullmatch(value):
            problem = f"column {column!r} holds chat messages written as text: {short(value)}; give lists of messages, "
            self.refuse(index, problem + "as in a JSON lines or Parquet file, or parse the text first")
        return value

    def is_chat(self, index: int, column: str) -> bool:
        """Whether a column holds chat messages in one row."""
        return isinstance(self.cell(index, column), list)

    def chat(self, index: int, column: str) -> list[Message]:
        """The chat messages of a column in one row.

        Raises:
            ValueError: They are not a non-empty list of messages with role and text, or the last one is empty.
        """
        messages: list[Message] = self.cell(index, column)
        if not messages or not all(map(_is_message, messages)):
            self.refuse(index, f"{column!r} is {short(messages)}, not chat messages of text; write {CHAT}")
        if not messages[-1]["content"].strip():  # a system message may be empty, the one to answer may not
            self.refuse(index, f"the last message of {column!r} is empty; fill it in")
        return messages

    def select(self, indices: Sequence[int]) -> "Table":
        """The table of these rows; it keeps all columns, also those that none of the rows has."""
        rows, lines = [self.rows[i] for i in indices], [self.lines[i] for i in indices]
        table = Table(rows, lines, self.source, self.unit, self.where)
        table.columns = self.columns
        return table

    def split(self, fraction: float, columns: Sequence[str]) -> tuple["Table", "Table"]:
        """Split into training and validation rows by a hash of the values in ``columns``.

        The side of a row depends only on these values, not on the order or number of rows, the seed or the machine.
        Rows with the same values (copies, or other texts by the same author) stay together, and so do files that are
        split on the same column: rows that one stage holds out, the next stage holds out too.

        Args:
            fraction: Fraction to hold out; the fraction of distinct values comes close to it. Where it leaves no
                validation rows, those of one value are held out.
            columns: Columns with the values.

        Raises:
            ValueError: One side would be empty.
        """
        self.require(columns)
        hashes = [unit_hash([self.cell(index, column) for column in columns]) for index in range(len(self))]
        bound = fraction if min(hashes, default=0.0) < fraction or len(set(hashes)) < 2 else min(hashes) + 1e-15
        sides: list[list[int]] = [[], []]
        for index, value in enumerate(hashes):
            sides[value < bound].append(index)
        for name, side in zip(("training", "validation"), sides, strict=True):
            if not side:
                advice = "give another fraction, or a separate file (val_path)"
                if len(self) > 1 and len(set(hashes)) == 1:
                    advice = f"all have the same {' and '.join(columns)}, and copies stay together; give a val_path"
                raise ValueError(
                    f"{self.where}: val_fraction={fraction} leaves no {name} rows of {len(self)}; {advice}"
                )
        return self.select(sides[0]), self.select(sides[1])


class Intake:
    """Checks rows while they are read: their size, that of all of them, and values that no later step can take.

    Args:
        where: The argument that named the source, for messages.
        source: File or data set, for messages.
        max_row_mb: MiB of the longest row; all rows may take :data:`FILE_ROWS` times as much.
        unit: What numbers of rows count.
    """

    def __init__(self, where: str, source: str, max_row_mb: float = ROW_MB, unit: str = "row") -> None:
        self.where, self.source, self.max_row_mb, self.unit = where, source, max_row_mb, unit
        self.row_limit = int(max_row_mb * 2**20)
        self._limit = FILE_ROWS * self.row_limit
        self._taken, self._logged = 0, time.monotonic()

    def refuse(self, number: int, problem: str, unit: str | None = None) -> NoReturn:
        """Raise the error of a row or line.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{self.where}: {place(self.source, number, unit or self.unit)}: {problem}")

    def refuse_long(self, number: int, hint: str = "shorten it") -> NoReturn:
        """Raise the error of a row that is too long."""
        self.refuse(number, f"a row of more than {self.max_row_mb:g} MiB; {hint}, or raise max_row_mb")

    def spend(self, number: int, n_bytes: int, unit: str | None = None) -> None:
        """Count what was read, and say every few seconds how far it is.

        Raises:
            ValueError: It is too much, with what was read before.
        """
        self._taken += n_bytes
        if self._taken > self._limit:
            problem = f"the rows up to here take more than {FILE_ROWS * self.max_row_mb:g} MiB ({ROW_COSTS} bytes each "
            advice = f"and their values); give a smaller file, or raise max_row_mb (the limit is {FILE_ROWS} times it)"
            self.refuse(number, problem + advice, unit)
        if number % 256 and n_bytes < self.row_limit // 256:
            return
        if time.monotonic() - self._logged > SECONDS_BETWEEN_LOGS:
            rank_zero_info(f"Read up to {place(self.source, number, unit or self.unit)}")
            self._logged = time.monotonic()

    def row(self, number: int, row: Mapping[Any, Any]) -> None:
        """Count and check a row from memory."""
        self.spend(number, self.values(number, row) + ROW_COSTS)

    def values(self, number: int, row: Mapping[Any, Any]) -> int:
        """The size of a row in bytes.

        Raises:
            ValueError: It is too large, nested too deeply, or has text or numbers that cannot be written.
        """
        size = sum(self._encoded(number, name, "a name") for name in row if isinstance(name, str))
        waiting = [(value, 1, name) for name, value in row.items()]
        while waiting:
            value, depth, column = waiting.pop()
            parts: Iterable[Any] = ()
            if isinstance(value, str):
                size += self._encoded(number, value, column)
            elif isinstance(value, Mapping):
                parts = [*value, *value.values()]
            elif isinstance(value, list | tuple):
                parts = [part for part in value if not isinstance(part, float)]
                size += 8 * len(value)
            elif isinstance(value, int):
                size += 8
                if not -HUGE < value < HUGE:
                    self.refuse(number, f"{short(column)} holds an integer of more than 4300 digits; write it as text")
            else:
                size += len(value) if isinstance(value, bytes) else int(getattr(value, "nbytes", 8))
            if size > self.row_limit:
                self.refuse_long(number)
            if parts and depth == DEPTH:
                self.refuse(number, f"{short(column)} holds more than {DEPTH} nested lists or objects; flatten them")
            waiting += [(part, depth + 1, column) for part in parts]
        return size

    def _encoded(self, number: int, text: str, column: Any) -> int:
        if half := lone_surrogate(text):
            self.refuse(number, f"{short(column)} holds {half}")
        return len(text) if text.isascii() else len(text.encode())


def lone_surrogate(text: str) -> str | None:
    """What is wrong with text that no tokenizer and no file takes, and what to do; None: nothing."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        half = f"a lone surrogate ({text[error.start]!a}, half of a character)"
        return f"{half} at character {error.start + 1}; replace or remove it"
    return None


def place(source: object, number: int, unit: str = "line") -> str:
    """A place in a file, for messages."""
    return f"{source}, {unit} {number}"


def short(value: Any, length: int = 80) -> str:
    """A value on one line, for messages.

    >>> print(short("two   words"), short("x" * 90, length=8))
    'two words' 'xxxxx...'
    """
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, TypeError, ValueError):  # nested too deeply, or not of JSON's types
        text = reprlib.repr(value)
    text = " ".join(text.split())
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def listed(names: Sequence[str], at_most: int = 20) -> str:
    """Names of columns, for messages."""
    shown = [name if len(name) <= 80 else f"{name[:77]}..." for name in names[:at_most]]
    return f"{shown}{f' and {len(names) - at_most} more' if len(names) > at_most else ''}"


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))
