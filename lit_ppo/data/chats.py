"""Chat messages in a column."""

from collections.abc import Callable
from typing import Any

from lit_ppo.data.encoding import Message
from lit_ppo.data.files import Table, short
from lit_ppo.data.tables import cell


def is_chat(value: Any) -> bool:
    """Whether a value is a list, as chat messages are."""
    return isinstance(value, list)


def chat_cell(where: str, table: Table, index: int, column: str, cased: Callable[[str], str]) -> list[Message]:
    """A row's chat messages, their contents cased.

    Raises:
        ValueError: They are not a non-empty list of messages with a role and text; names the place.
    """
    messages = cell(where, table, index, column)
    good = isinstance(messages, list) and len(messages) > 0
    good = good and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    good = good and all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages)
    if not good:
        raise ValueError(
            f"{where}: {table.place(index)}: {column!r} is {short(messages)}, not chat messages of text; "
            'write [{"role": "user", "content": "..."}, ...]'
        )
    if not messages[-1]["content"].strip():  # a system message may be empty, what is to be answered may not
        raise ValueError(f"{where}: {table.place(index)}: the last message of {column!r} is empty; fill it in")
    return [{**m, "content": cased(m["content"])} for m in messages]
