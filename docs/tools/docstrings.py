"""An extension of griffe: what our docstrings write in reStructuredText, as Markdown."""

import re
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert

ROLE = re.compile(r":(?:class|func|meth|mod):`~?([\w.]+)`")
DISPLAYED = re.compile(r"\.\. math::\s*(.+?)(?=\n\s*\n|\Z)", re.DOTALL)
INLINE = re.compile(r":math:`([^`]+)`")
ARXIV = re.compile(r"(?<![/\[])arXiv:(\d{4}\.\d{5}|cs/\d{7})")
EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^.*\S.*\n?)*)", re.MULTILINE)


class Docstrings(Extension):
    """Names become links, and equations MathML, which browsers show without a script."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, obj)


def markdown(text: str, obj: Object) -> str:
    """A docstring as Markdown."""
    text = DISPLAYED.sub(lambda match: f"\n\n{mathml(match[1], 'block')}\n\n", text)
    text = INLINE.sub(lambda match: mathml(match[1], "inline"), text)
    text = ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text).replace("\nSource: ", "\n\nSource: ")
    text = text.replace("::\n\n", ":\n\n")
    text = EXAMPLE.sub(lambda match: f"\n```pycon\n{match[0].rstrip()}\n```\n", text)
    return ROLE.sub(_link, text)


def _link(match: re.Match[str]) -> str:
    """The last part of a name; a link if the name is complete."""
    short = f"`{match[1].rpartition('.')[2]}`"
    return f"[{short}][{match[1]}]" if match[1].startswith("lit_ppo.") else short


def mathml(tex: str, display: str) -> str:
    """An equation as one line of MathML."""
    return convert(" ".join(tex.split()), display=display).replace("\n", "")
