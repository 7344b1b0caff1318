"""What a model has written, shown as it is: no terminal, no browser and no table obeys it."""

from collections.abc import Callable, Sequence
from html import escape

BROKEN = "\ufffd"  # what a tokenizer shows for a part of a character
# Python takes these for not printable: the joiners of Persian words and of emoji, the space of Chinese and Japanese.
HARMLESS = "\u200c\u200d\u3000"


def printable(text: str) -> str:
    r"""Text on one line, without what a terminal would obey.

    >>> print(printable("fine\x1b[2J\nnext"))
    fine\x1b[2J\nnext
    """
    return "".join(c if c.isprintable() or c in HARMLESS else c.encode("unicode_escape").decode() for c in text)


def pieces(decode: Callable[[list[int]], str], ids: Sequence[int], values: Sequence[float]) -> list[tuple[str, float]]:
    """Tokens as text, each with its value; those that make up one character come as one, with the sum of theirs.

    A token is decoded behind the one before, since tokenizers write the space between two words only there.

    Args:
        decode: From ids to text.
        ids: The tokens.
        values: One number a token.

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
            continue  # the rest of the character is to come
        found.append((text, sum(values[start:stop])))
        before, start = token, stop
    return found


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """An HTML table whose cells show their text, whatever it is; Markdown leaves its inside alone.

    Args:
        header: The columns' names.
        rows: Of cells.
        numbers: Names of columns that TensorBoard must not break in the middle, as it does with words and numbers.

    >>> html_table(["response"], [["<b>| a"]])
    '<table><thead><tr><th>response</th></tr></thead><tbody><tr><td>&lt;b&gt;| a</td></tr></tbody></table>'
    """
    whole = [name in numbers for name in header]
    head, body = _row("th", header, whole), "".join(_row("td", row, whole) for row in rows)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, cells: Sequence[str], whole: Sequence[bool]) -> str:
    shown = [escape(printable(cell)) for cell in cells]
    shown = [f"<pre>{text}</pre>" if keep else text for text, keep in zip(shown, whole, strict=True)]
    return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in shown) + "</tr>"
