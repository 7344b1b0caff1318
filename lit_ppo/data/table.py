"""A table of rows that knows where each row stands, so that every error names file and line."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

Row = dict[str, Any]
Message = dict[str, Any]


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
                    f"{self.where}: {self.source} has no column {column!r}, only {self.columns}; "
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
            self.refuse(index, f"no value for column {column!r}, only for {given}; add it or delete the row")
        return value

    def text(self, index: int, column: str) -> str:
        """The text of a column in one row.

        Raises:
            ValueError: It is missing, empty or not text.
        """
        value = self.cell(index, column)
        if not isinstance(value, str):
            problem = f"column {column!r} holds {type(value).__name__} {short(value)}, not text; write it as a string"
            self.refuse(index, problem)
        if not value.strip():
            self.refuse(index, f"empty {column!r}; fill it in or delete the row")
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
            problem = f"{column!r} is {short(messages)}, not chat messages of text; "
            self.refuse(index, problem + 'write [{"role": "user", "content": "..."}, ...]')
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
                raise ValueError(
                    f"{self.where}: val_fraction={fraction} leaves no {name} rows of {len(self)}; "
                    "give another fraction, or a separate file (val_path)"
                )
        return self.select(sides[0]), self.select(sides[1])


def place(source: object, number: int, unit: str = "line") -> str:
    """A place in a file, for messages."""
    return f"{source}, {unit} {number}"


def short(value: Any, length: int = 80) -> str:
    """A value on one line, for messages.

    >>> print(short("two   words"), short("x" * 90, length=8))
    'two words' 'xxxxx...'
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def unit_hash(key: Sequence[Any]) -> float:
    """A number in [0, 1) that depends only on the values, the same in every process and on every machine.

    >>> unit_hash(["train/pos/5235"]) == unit_hash(["train/pos/5235"]) != unit_hash(["train/pos/5236"])
    True
    """
    texts = [value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str) for value in key]
    digest = hashlib.sha256("\x1f".join(texts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))
