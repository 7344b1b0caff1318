"""Values and exceptions of other people's code as text for messages: short, on one line, never another exception."""

import reprlib
from collections.abc import Callable

LONGEST = 4000  # characters of a message
# Not printable for Python, but needed: joiners of Persian words and of emoji, the space of Chinese and Japanese.
HARMLESS = "\u200c\u200d\u3000"

_short = reprlib.Repr()
_short.maxlevel = 4
_short.maxtuple = _short.maxlist = _short.maxdict = _short.maxset = _short.maxfrozenset = 12
_short.maxstring = _short.maxother = _short.maxlong = 200


def shown(value: object, length: int = 80) -> str:
    r"""The quoted text of a value.

    >>> print(shown("two   words"), shown(3.5), shown("x" * 90, length=8), shown("\x1b[2J"))
    'two words' '3.5' 'xxxxx...' '\x1b[2J'
    """
    return repr(_cut(_text(value), length))


def written(value: object) -> str:
    """A value as one would write it, whatever its ``repr`` does.

    >>> written(["a"] * 1000)
    "['a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', ...]"
    """
    try:
        if isinstance(value, int) and abs(value) > 10**200:  # Python refuses to write out very large ones
            return f"<int of {value.bit_length()} bits>"
        return shortened(_short.repr(value), 202)
    except Exception:
        return f"<{type(value).__name__}>"


def reason(error: BaseException, length: int = 500) -> str:
    """Type and text of an exception.

    >>> reason(KeyError("no such film")), reason(ValueError())
    ("KeyError: 'no such film'", 'ValueError')
    """
    text = shortened(_text(error), length)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def message_of(error: BaseException, length: int = 500) -> str:
    r"""The text of an exception, or its type where it has none.

    >>> message_of(OSError("no space\nleft")), message_of(ValueError())
    ('no space left', 'ValueError')
    """
    return shortened(_text(error), length) or type(error).__name__


def first_line(error: BaseException, length: int = 200) -> str:
    r"""The first line of an exception's text, or its type where it has none.

    >>> first_line(OSError("no file\nTraceback")), first_line(ValueError(""))
    ('no file', 'ValueError')
    """
    return shortened(_text(error)[:100_000].strip().partition("\n")[0], length) or type(error).__name__


def shortened(text: str, length: int) -> str:
    """Text on one line, cut to ``length`` characters; control characters are escaped."""
    return _cut(text, length, escaped)


def _cut(text: str, length: int, change: Callable[[str], str] = str) -> str:
    start = text[: 20 * length + 1000]
    flat = change(" ".join(start.split()))
    return flat if len(flat) <= length and len(start) == len(text) else flat[: length - 3] + "..."


def on_one_line(text: str) -> str:
    """A message on one line of bounded length, with control characters escaped."""
    return escaped(shortened(text, LONGEST))


def escaped(text: str, *, line_ends: bool = True, escape: Callable[[str], str] | None = None) -> str:
    r"""With control characters and those that change the direction of writing as escapes.

    A terminal must not obey a response that is part of a message.

    Args:
        text: Of anybody.
        line_ends: Keep them; otherwise the text comes on one line.
        escape: Of one character; by default as in Python.

    >>> print(escaped("fine\x1b[2J\nnext", line_ends=False))
    fine\x1b[2J\nnext
    """
    kept = HARMLESS + "\n" if line_ends else HARMLESS
    escape = escape or (lambda c: c.encode("unicode_escape").decode())
    return "".join(c if c.isprintable() or c in kept else escape(c) for c in text)


def _text(value: object) -> str:
    try:
        return str(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of that object's code
        return f"<{type(value).__name__} whose text cannot be made: {type(error).__name__}>"
