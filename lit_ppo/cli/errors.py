"""Errors as one line that names place, value and remedy."""

import difflib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_ppo.cli.layers import config_files

NOISE = re.compile(
    r"^(- )?(Does not validate against any|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>"
    r"|Not a valid subclass|Subclass types expect|a class path \(str\)|a dict with|a dict without|Expected a path but)"
)
ENVELOPE = re.compile(r"^(?:Parser key \"(?P<key>[^\"]+)\"|Problem with given class_path '(?P<cls>[^']+)')(?::|$)")


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy that names what is nearest to ``name``.

    >>> nearest("max_stepz", ["max_steps", "devices"])
    "did you mean 'max_steps'?"
    """
    known = sorted({k for k in known if k and not k.startswith("_")})
    last = {k: k.rsplit(".", 1)[-1].lstrip("-") for k in known}
    wanted = name.rsplit(".", 1)[-1].lstrip("-")
    scores = {
        k: max(difflib.SequenceMatcher(None, name, k).ratio(), difflib.SequenceMatcher(None, wanted, last[k]).ratio())
        for k in known
    }
    best = sorted((k for k in known if scores[k] >= 0.6), key=lambda k: (-scores[k], -_shared(name, k), len(k), k))
    best = [k for k in best[:3] if scores[k] > scores[best[0]] - 0.15]
    if best:
        return "did you mean " + " or ".join(f"'{k}'" for k in best) + "?"
    return f"known: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}" if known else "remove it"


def _shared(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name, other).ratio()


def parsing_error(message: str, options: Sequence[str], arguments: Sequence[str] = ()) -> str:
    """The parser's message, which may be a tree of many lines, as one line with a remedy.

    Args:
        message: What jsonargparse says.
        options: The option strings of the parser.
        arguments: The command's; configuration files among them are searched for the line at fault.
    """
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        flag = match[1].partition("=")[0]
        return f"{flag}: no such option; {nearest(flag, options)}"
    if match := re.search(r"does not accept option '([^']+)'", message):
        keys = [option.lstrip("-") for option in options if option.startswith("--")]
        return f"{_where(match[1], arguments)}{match[1]}: no such key; {nearest(match[1], keys)}"
    if message.startswith("Problems parsing config"):
        return _broken_yaml(config_files(arguments)) or _flat(message)
    path, reason = _deepest(message)
    quoted = re.search(r"'(\w+)' is not accepted|no class named '([\w.]+)'", reason)
    culprit = (quoted[1] or quoted[2]) if quoted else path.rsplit(".", 1)[-1]
    return f"{_where(culprit, arguments)}{path}: {reason}" if path else _flat(reason)


def _deepest(message: str) -> tuple[str, str]:
    """Where in the tree of reasons the deepest one stands, and that reason with its remedy."""
    chain: list[tuple[int, str, str]] = []  # indentation, text for the path, class if the entry is one
    leaves: list[tuple[int, str, str, str]] = []
    for raw in message.splitlines():
        indent, line = len(raw) - len(raw.lstrip(" -")), raw.strip(" -")
        if not line or NOISE.match(line):
            continue
        while chain and chain[-1][0] >= indent:
            chain.pop()
        envelope = ENVELOPE.match(line)
        if envelope:
            key, cls = envelope["key"], envelope["cls"]
            chain.append((indent, key or f"({cls.rsplit('.', 1)[-1]})", cls or ""))
            line = line[envelope.end() :].strip()
        if line and not line.startswith("Expected a <class 'NoneType'>"):
            cls = next((c for _, _, c in reversed(chain) if c), "")
            leaves.append((len(chain), _join(text for _, text, _ in chain), cls, line))
    if not leaves:
        return "", _flat(message)
    _, path, cls, reason = max(leaves, key=lambda leaf: leaf[0])
    return path, _remedy(re.sub(r"\b(fit|validate|test|predict)\.", "", reason), path, cls, message)


def _join(parts: Iterable[str]) -> str:
    return re.sub(r"\.\(", " (", ".".join(parts)).strip()


def _remedy(reason: str, path: str, cls: str, message: str) -> str:
    key = re.sub(r" \(\w+\)", "", path)
    if match := re.search(r"Option '([^']+)' is not accepted", reason):
        if match[1] == "class_path":
            return "'class_path' is not accepted beside other keys; put those under init_args"
        within = re.search(r"class_path='([\w.]+)'", reason)
        return f"{match[1]!r} is not accepted; {nearest(match[1], _arguments(within[1] if within else cls))}"
    if match := re.match(r"Expected a dot import path string: (\S+)", reason):
        return f"no class named {match[1]!r}; {nearest(match[1], _class_names(message))}"
    if match := re.match(r"the following arguments are required: (.+)", reason):
        return f"{match[1]} is missing; set it with --{key + '.' if key else ''}{match[1]} or in a configuration"
    if match := re.match(r"Expected an? <class '(\w+)'>\. Got value: (.*)", reason):
        return f"{match[2]!r} is not of type {match[1]}; give a value of that type"
    if match := re.match(r"Expected a typing.Literal\[(.*)\]\. Got value: (.*)", reason):
        return f"{match[2]!r} is not one of {match[1]}; give one of them"
    if match := re.search(r"(File|Directory) does not exist: (.*)", reason):
        return f"{match[1].lower()} {match[2]} does not exist; check the path"
    given = re.search(r"^\s*Given value: (.*)$", message, re.MULTILINE)
    return reason if given is None or given[1] in reason else f"{reason} (given: {given[1][:200]})"


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _arguments(class_path: str) -> list[str]:
    """Names of the constructor's arguments, those of the bases included."""
    names: list[str] = []
    for base in getattr(_import(class_path), "__mro__", ()):
        if "__init__" in vars(base) and base is not object:
            parameters = inspect.signature(base.__init__).parameters.values()
            names += [
                p.name for p in parameters if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            ]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return names


def _class_names(message: str) -> list[str]:
    """Short names of the classes that the message says are possible, and of the public ones of this package."""
    found = [
        name
        for module in [m for key, m in sys.modules.items() if key.startswith("lit_ppo.")]
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    todo = [_import(path) for path in re.findall(r"[\w.]+\.[A-Z]\w+", " ".join(re.findall(r"Subtypes: (.*)", message)))]
    while todo:
        cls = todo.pop()
        if isinstance(cls, type):
            found.append(cls.__name__)
            todo += type.__subclasses__(cls)
    return found


def _where(path: str, arguments: Sequence[str]) -> str:
    """The line of a configuration file that holds the path's last key, or that class; empty if it was an argument."""
    word = re.escape(path.rsplit(".", 1)[-1])
    if any(re.search(rf"^--\S*\b{word}\b", argument) for argument in arguments):
        return ""
    pattern = re.compile(rf"(^|[\s{{,-])({word}\+?\s*:|class_path:\s*[\w.]*\b{word}\b)")
    for file in reversed(config_files(arguments)):
        if Path(file).is_file():
            for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
                if pattern.search(line.partition("#")[0]):
                    return f"{file}:{number}: "
    return ""


def _broken_yaml(files: Sequence[str]) -> str:
    import yaml

    for file in files:
        try:
            yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 0
            return f"{file}:{line}: not valid YAML: {error.problem or error.context}; check brackets and indentation"
        except (OSError, UnicodeDecodeError) as error:
            return f"{file}: cannot be read: {error}"
    return ""


def running_error(error: BaseException) -> str:
    """An exception raised while building or running, as one line.

    What this package raises on purpose speaks for itself; anything else says what it is and where it came from.
    """
    error = next((e for e in _chain(error) if not _module_of(e).startswith("jsonargparse")), error)
    message, module = _flat(str(error)), _module_of(error)
    unintended = (LookupError, AttributeError, NameError, AssertionError, ImportError)
    if message and module.partition(".")[0] == "lit_ppo" and not isinstance(error, unintended):
        return message
    *_, line = [0, *(number for _, number in traceback.walk_tb(error.__traceback__))]
    place = f" in {module}, line {line}" if module else ""
    return f"{type(error).__name__}{place}: {message or 'no message'}; run again with --debug for the traceback"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from: the parser wraps those of the classes that it builds."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _module_of(error: BaseException) -> str:
    """Name of the module that raised it."""
    *_, module = ["", *(f.f_globals.get("__name__", "") for f, _ in traceback.walk_tb(error.__traceback__))]
    return str(module)


def _flat(text: str) -> str:
    """On one line; a response in it is not obeyed by a terminal."""
    flat = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in flat)
