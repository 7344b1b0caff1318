"""What all data modules do with a table: pick columns, check them, hold rows out."""

import hashlib
import json
from typing import Any

from lit_ppo.data.files import Table, short


def cell(where: str, table: Table, index: int, column: str) -> Any:
    """The value of a column in one row.

    Raises:
        ValueError: The row has no such column, or null in it; names the place and the columns that are there.
    """
    require_columns(where, table, [column])
    row = table.rows[index]
    if row.get(column) is None:
        there = [name for name, value in row.items() if value is not None]
        raise ValueError(
            f"{where}: {table.place(index)}: no value for column {column!r}, only for {there}; add it or delete the row"
        )
    return row[column]


def text_cell(where: str, table: Table, index: int, column: str) -> str:
    """A column's text in one row.

    Raises:
        ValueError: It is missing, empty or not text; names the place.
    """
    value = cell(where, table, index, column)
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {table.place(index)}: column {column!r} holds {type(value).__name__} {short(value)}, not text; "
            "write it as a string"
        )
    if not value.strip():
        raise ValueError(f"{where}: {table.place(index)}: empty {column!r}; fill it in or delete the row")
    return value


def require_columns(where: str, table: Table, columns: list[str]) -> None:
    """Checks that the table has these columns.

    Raises:
        ValueError: One is missing; names those that are there.
    """
    for column in columns:
        if column not in table.columns:
            raise ValueError(
                f"{where}: {table.source} has no column {column!r}, only {table.columns}; "
                "name one of these, or give column_names for a CSV or TSV file without a header"
            )


def split_table(where: str, table: Table, fraction: float, columns: list[str]) -> tuple[Table, Table]:
    """Splits off a validation part by a hash of the values in ``columns``.

    The side depends on nothing but these values: not on the order or number of rows, the seed or the machine.
    Rows that share them (copies, or other texts by the same author) therefore stay together, and so do files that
    are split on the same column: what one stage holds out, the next holds out too.

    Args:
        where: Argument to name in messages.
        table: All rows.
        fraction: Share to hold out; that of the distinct values comes close to it, not exactly.
        columns: Columns whose values decide.

    Raises:
        ValueError: A side is left empty.
    """
    require_columns(where, table, columns)
    sides: list[list[int]] = [[], []]
    for index in range(len(table)):
        key = [cell(where, table, index, column) for column in columns]
        sides[unit_hash(key) < fraction].append(index)
    train, held_out = (table.select(side) for side in sides)
    for name, side in (("training", train), ("validation", held_out)):
        if not len(side):
            raise ValueError(
                f"{where}: val_fraction={fraction} leaves no {name} rows of {len(table)}; "
                "give another fraction, or a file of its own (val_path)"
            )
    return train, held_out


def unit_hash(key: list[Any]) -> float:
    """A number in [0, 1) that depends on the values alone, alike in every process and on every machine.

    >>> unit_hash(["train/pos/5235"]) == unit_hash(["train/pos/5235"]) != unit_hash(["train/pos/5236"])
    True
    """
    texts = [value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str) for value in key]
    digest = hashlib.sha256("\x1f".join(texts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
