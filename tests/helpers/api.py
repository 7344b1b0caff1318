"""The public API as text: names, arguments, methods and fields, as they are written.

    python -m tests.helpers.api --write

rewrites ``tests/api.txt``, which ``tests/test_api.py`` compares.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import lit_ppo
import lit_ppo.callbacks
import lit_ppo.callbacks.base
from lit_ppo.callbacks import PPOCallback

FILE = Path(__file__).resolve().parents[1] / "api.txt"
PROPERTIES = (property, cached_property)
PUBLIC = {
    "lit_ppo": lit_ppo.__all__,
    "lit_ppo.callbacks": lit_ppo.callbacks.__all__,
    "lit_ppo.callbacks.base": ["ExperienceLike", "MinibatchLike", "PPOModule"],
}


def text() -> str:
    """All names of ``PUBLIC``, sorted."""
    lines: list[str] = []
    for package, names in PUBLIC.items():
        for name in sorted(names):
            lines += [*_object(f"{package}.{name}", getattr(sys.modules[package], name)), ""]
    return "\n".join(lines)


def _object(name: str, value: Any) -> Iterator[str]:
    """The lines of a function; or of a class, without the hooks and methods that it fills in for a library or ours."""
    if not inspect.isclass(value):
        yield from _signature(name, _parsed(value))
        return
    ours = [cls for cls in value.__mro__ if cls.__module__.partition(".")[0] == "lit_ppo"]
    known = {member for cls in value.__mro__[1:] if cls not in ours or cls is PPOCallback for member in dir(cls)}
    members: dict[str, Any] = {}
    for cls in reversed(ours):
        body = [part for node in _parsed(cls).body for part in (node.orelse if isinstance(node, ast.If) else [node])]
        members |= {node.target.id: node for node in body if isinstance(node, ast.AnnAssign)}
        members |= {member: found for member, found in vars(cls).items() if member in ("__init__", "__call__")}
        members |= {m: found for m, found in vars(cls).items() if callable(found) or isinstance(found, PROPERTIES)}
    init = members.pop("__init__", None)
    yield from _signature(name, _parsed(init) if _is_written(init) else None)
    for member, found in sorted(members.items()):
        if member in known - {"__call__"} or (member.startswith("_") and member != "__call__"):
            continue
        if isinstance(found, ast.AST):
            yield f"  .{ast.unparse(found)}"
        elif inspect.isclass(found):
            yield f"  .{member}: class"
        else:
            yield f"  .{_method(member, found)}"


def _is_written(function: Any) -> bool:
    """Whether it is a function with source, unlike the constructor of a dataclass."""
    return inspect.isfunction(function) and inspect.unwrap(function).__code__.co_filename != "<string>"


def _method(name: str, found: Any) -> str:
    function = next((getattr(found, part) for part in ("fget", "func", "__func__") if hasattr(found, part)), found)
    node = _parsed(function)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{name}{'' if isinstance(found, PROPERTIES) else f'({ast.unparse(node.args)})'}{returns}"


def _signature(name: str, node: Any) -> Iterator[str]:
    yield name
    if node is None:
        return
    for part in _arguments(node.args):
        yield f"    {part}"
    if node.name != "__init__" and node.returns:
        yield f"    -> {ast.unparse(node.returns)}"


def _arguments(args: ast.arguments) -> Iterator[str]:
    """Each argument with type and default; ``/`` is not used."""
    plain = args.posonlyargs + args.args
    defaults: list[ast.expr | None] = [*[None] * (len(plain) - len(args.defaults)), *args.defaults]
    for argument, default in zip(plain, defaults, strict=True):
        if argument.arg != "self":
            yield _argument(argument, default)
    if args.vararg:
        yield f"*{_argument(args.vararg, None)}"
    elif args.kwonlyargs:
        yield "*"
    for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield _argument(argument, default)
    if args.kwarg:
        yield f"**{_argument(args.kwarg, None)}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default is not None else "")


def _parsed(value: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value)))).body[0]


if __name__ == "__main__":
    if "--write" in sys.argv:
        FILE.write_text(text(), encoding="utf-8")
    else:
        print(text())
