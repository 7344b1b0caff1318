"""Show text of a model safely in terminals, browsers and tables."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from lit_ppo.shown import escaped

BROKEN = "\ufffd"  # decoded from a part of a character


def pieces(decode: Callable[[list[int]], str], ids: Sequence[int], values: Sequence[float]) -> list[tuple[str, float]]:
    """Tokens as text, each with its value; tokens of one character are merged and their values summed.

    Each token is decoded together with the previous one, since tokenizers add a space only between two tokens.

    Args:
        decode: From ids to text.
        ids: The tokens.
        values: One number per token.

    >>> decode = lambda ids: " ".join(["we", "saw", "it"][i] for i in ids)
    >>> pieces(decode, [0, 1, 2], [0.5, 0.0, -1.0])
    [('we', 0.5), (' saw', 0.0), (' it', -1.0)]
    """
    found: list[tuple[str, float]] = []
    before: list[int] = []
    start = 0
    for stop in range(1, len(ids) + 1):
        token = list(ids[start:stop])
        text = decode(before + token)[len(decode(before)) if before else 0 :]
        if text.endswith(BROKEN) and stop < len(ids):
            continue  # the character is incomplete
        found.append((text, sum(values[start:stop])))
        before, start = token, stop
    return found


def readable_prompts(experience: Any) -> list[str]:
    r"""Prompts without the markup of a chat template: the turns of a chat, one per line.

    Args:
        experience: With ``prompts`` and ``columns``.

    >>> from types import SimpleNamespace
    >>> chat = [{"role": "user", "content": "hi"}]
    >>> readable_prompts(SimpleNamespace(prompts=["<|user|>hi<|end|>\n<|assistant|>"], columns={"messages": [chat]}))
    ['user: hi']
    """
    chats = experience.columns.get("messages")
    if chats is None:
        return list(experience.prompts)
    return ["\n".join(f"{turn['role']}: {turn['content']}" for turn in chat) for chat in chats]


def html(text: str) -> str:
    r"""Text as HTML that shows it, control characters escaped and lines kept.

    >>> html("<b>\nfine\x1b")
    '&lt;b&gt;<br/>fine\\x1b'
    """
    return "<br/>".join(escape(escaped(line, line_ends=False)) for line in text.split("\n"))


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """An HTML table, in which Markdown is not interpreted.

    Args:
        header: Names of the columns.
        rows: Rows of cells in HTML; see :func:`html`.
        numbers: Names of columns that TensorBoard must not wrap; it would break words and numbers.

    >>> html_table(["response"], [[html("<b>| a")]])
    '<table><thead><tr><th>response</th></tr></thead><tbody><tr><td>&lt;b&gt;| a</td></tr></tbody></table>'
    """
    unbroken = [name in numbers for name in header]
    head, body = _row("th", header, unbroken), "".join(_row("td", row, unbroken) for row in rows)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, cells: Sequence[str], unbroken: Sequence[bool]) -> str:
    shown = [f"<pre>{cell}</pre>" if keep else cell for cell, keep in zip(cells, unbroken, strict=True)]
    return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in shown) + "</tr>"
