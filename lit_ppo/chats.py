"""Chat messages in a column."""

from collections.abc import Callable
from typing import Any

from lit_ppo.encoding import Message
from lit_ppo.files import Table
from lit_ppo.tables import cell


def is_chat(value: Any) -> bool:
    """Whether a value is a list, as chat messages are."""
    return isinstance(value, list)


def chat_cell(where: str, table: Table, index: int, column: str, cased: Callable[[str], str]) -> list[Message]:
    """A row's chat messages, their contents cased.

    Raises:
        ValueError: They are not a non-empty list of messages with a role and some content; names the place.
    """
    messages = cell(where, table, index, column)
    good = isinstance(messages, list) and len(messages) > 0
    good = good and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages)
    if not good:
        raise ValueError(
            f"{where}: {table.place(index)}: {column!r} is {messages!r:.60}, not chat messages; "
            'write [{"role": "user", "content": "..."}, ...]'
        )
    if not any(isinstance(m["content"], str) and m["content"].strip() for m in messages):
        raise ValueError(f"{where}: {table.place(index)}: empty {column!r}; fill it in or delete the row")
    return [{**m, "content": cased(m["content"]) if isinstance(m["content"], str) else m["content"]} for m in messages]
