"""What is wrong with arguments and configurations, as one line: place, value and remedy."""

import os
import re
import traceback
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from lit_ppo.cli.layers import RefusedText, compose, layers, line_of
from lit_ppo.run.errors import alternatives, module_of, running_error
from lit_ppo.shown import on_one_line, shown

# jsonargparse raises a chain of exceptions, from the key at the top down to the reason. Its exceptions have no
# attributes: key, class, type and value are only in the first lines of their texts, in these forms. Where a form
# changes in another version, the message is longer and less plain, but still there.
KEY = re.compile(r'Parser key "([^"]+)"')
CLASS = re.compile(r"class_path[ =]'([\w.]+)'")
OPTION = re.compile(r"[Oo]ption '([^']+)'")
EXPECTED = re.compile(r"Expected an? (?:<class ')?(?:typing\.)?(.+?)(?:'>)?\. Got value: (.*)", re.DOTALL)
NOT_A_NAME = re.compile(r"(?:Key must be a string, got|Empty nested key|Spaces not allowed in keys): (.*?)\.?$")
GROUP = re.compile(r'Parser key "[^"]+": Unable to load config "(.*)"', re.DOTALL)
CLASS_EXPECTED = re.compile(r"(?:Not a valid subclass of|Expected an import path)\b.*?[Gg]ot (?:value: )?(.*)")
ENTRIES = re.compile(r"(Missing required|Unexpected) keys: \{(.*?)\}\. Got value", re.DOTALL)
STARTS = re.compile(r"\W*(unrecognized arguments|Expected a dot import path string|.* arguments are required): (.*)")
NO_KEYS = ("help", "config", "print_config", "print_shtab")  # options that no configuration has
# packages whose classes a configuration may name without the package
PACKAGES = (
    "lit_ppo",
    "lit_ppo.callbacks",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "torch.optim",
    "torch.optim.lr_scheduler",
)


def nearest(name: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """A remedy that names what is nearest to ``name``.

    Args:
        name: What was given.
        known: What could be meant.
        listed: What to list if nothing is near; by default all.

    >>> nearest("max_stepz", ["max_steps", "devices"])
    "did you mean 'max_steps'?"
    """
    known = sorted(key for key in set(known) if not key.startswith("_"))
    last = {_last(key): key for key in known}
    close = get_close_matches(name, known, n=1) or [last[key] for key in get_close_matches(_last(name), last, n=1)]
    if close:
        return f"did you mean {close[0]!r}?"
    known = known if listed is None else sorted(listed)
    return f"known: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}" if known else "remove it"


def _last(name: str) -> str:
    return name.rpartition(".")[2].lstrip("-")


def parsing_error(error: ArgumentError, options: Sequence[str], arguments: Sequence[str]) -> str:
    """What the parser refuses, as one line.

    Args:
        error: Raised by jsonargparse.
        options: The option strings of the parser.
        arguments: Arguments of the command; the configuration files among them are searched for the line at fault.
    """
    *causes, reason = _deepest(error)
    keys: list[str] = []
    entries: list[str] = []  # of mappings below the last key
    cls = path = ""
    for cause in (*causes, reason):
        message = str(cause)
        if isinstance(cause, ArgumentError):
            continue
        inner = _entries(cause)
        entries, path = [*entries, *inner], ".".join([path, *inner])
        if key := KEY.match(message):
            if key[1] not in keys[-1:]:
                keys.append(key[1])
                entries, path = [], f"{path}.{key[1]}"
        elif (found := CLASS.search(message.partition("\n")[0])) and found[1] != cls:
            cls = found[1]
            path += f" ({_last(cls)})"
    siblings = alternatives(causes[-1]) if causes else [reason]
    name, text = _explain(reason, siblings, [] if entries else keys, cls, options)
    path = f"{path.lstrip('.')}: " if path else ""
    if module := _read_as_file(causes) or _read_as_text(str(reason), arguments):
        name, text = (entries or keys or [""])[-1], _no_attribute(module, "py")
    files = [each.file for each in (reason, *causes) if hasattr(each, "file")]
    file = next((file for file in files if not (module and file.endswith(".py"))), None)
    name = name or ".".join(entries) or (keys or [""])[-1]
    if file is not None:
        return f"{_place(name, file, reason if not module else None) or f'{file}: '}{path}{text}"
    return f"{_where(name, arguments)}{path}{_refused_text(name, arguments) or text}"


def _explain(
    reason: BaseException, siblings: list[BaseException], keys: list[str], cls: str, options: Sequence[str]
) -> tuple[str, str]:
    """The key or class at fault, empty if it is the last of ``keys``; and the reason with its remedy."""
    message = str(reason)
    start, value = match.groups() if (match := STARTS.match(message)) else ("", "")
    if isinstance(reason, RefusedText):
        return "", str(reason.problem)
    if isinstance(reason, yaml.YAMLError):
        problem = getattr(reason, "problem", None) or str(reason).partition("\n")[0]
        return "", f"not valid YAML: {problem}; check brackets, indentation and characters"
    if isinstance(reason, KeyError) and (option := OPTION.search(message)):
        name = option[1]
        if not cls:
            known = {option[2:].rstrip("+") for option in options if option.startswith("--")}
            known = {key for key in known if key not in NO_KEYS and not name.startswith(f"{key}.")}
            beside = [key for key in known if key.rpartition(".")[0] == name.rpartition(".")[0]]
            return name, f"{name}: no such key; {nearest(name, known, beside)}"
        if name == "class_path":
            return name, "only class_path and init_args may stand here; put the other keys under init_args"
        return name, f"no argument {name!r}; {nearest(name, [*_arguments_of(cls), 'class_path'])}"
    if match := NOT_A_NAME.match(message):
        key = match[1].strip('"')
        return key, f"keys must be names without spaces, got {key!r}; correct it"
    if message.startswith("Unexpected config"):
        return "", "expected the path of a configuration file, or keys and values as YAML; correct --config"
    if start.startswith("unrecognized"):
        flag = re.split(r"[= ]", value)[0]
        if not flag.startswith("-"):
            return "", f"{flag}: belongs to no option; write --config {flag} for a job, and quote values with spaces"
        return "", f"{flag}: no such option; {nearest(flag, options)}"
    if start.startswith("Expected"):
        names = [name for package in PACKAGES for name in dir(import_module(package)) if name[0].isupper()]
        if value in names:
            return value, f"class {value} does not fit here"
        return value, f"no class named {value!r}; {nearest(value, names)}"
    if match := ENTRIES.match(message):
        names = re.findall(r"'([^']*)'", match[2])
        known = next((scope["dict_annotations"] for scope in _scopes(reason) if "dict_annotations" in scope), set())
        if match[1] == "Missing required":
            return "", f"{', '.join(names)} is missing; known keys: {', '.join(known)}"
        return names[0], f"no key {names[0]!r}; {nearest(names[0], known)}"
    if isinstance(reason, ModuleNotFoundError) and module_of(reason).startswith("jsonargparse"):
        from lit_ppo.rewards.signature import WHERE_MODULES_ARE  # imports PyTorch, which other answers do without

        return "", f"no module named {reason.name!r}; {WHERE_MODULES_ARE}"
    if match := re.match(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return match[2], _no_attribute(match[1], match[2])
    if start:
        if value.split(", ")[0] in ("model", "fit.model"):
            return "", "model is missing; name a job first, such as --config quickstart ('lit-ppo ls' lists them)"
        missing = [re.sub(r"^(fit|validate|test|predict)\.", "", name) for name in value.split(", ")]
        flags = " ".join(f"--{'.'.join([*keys, name])}" for name in missing)
        if cls and not keys:  # no option reaches the entries of a mapping
            return "", f"{', '.join(missing)} is missing; give it under init_args in a configuration"
        return "", f"{', '.join(missing)} is missing; set it with {flags} or in a configuration"
    if given := EXPECTED.match(message):
        found = [match[1] for sibling in siblings if (match := EXPECTED.match(str(sibling)))]
        types = " or ".join(dict.fromkeys(name for name in found if name != "NoneType"))
        return "", f"expected {types or 'null'}, got {shown(given[2], 200)}"
    if given := GROUP.match(message):
        return "", f"expected a mapping, got {shown(given[1], 200)}; give its keys below it, or leave it out"
    if given := CLASS_EXPECTED.match(message):
        return "", f"expected a class, got {shown(given[1], 200)}; give class_path and init_args, or leave it out"
    if module_of(reason).partition(".")[0] not in ("", "argparse", "jsonargparse", "lit_ppo"):
        return "", running_error(reason)  # of a module that is imported for a class in it
    return "", on_one_line(message.partition("\nSubclass types expect")[0])


def _scopes(error: BaseException) -> list[dict[str, Any]]:
    """Variables of the parser's function that checks a value by its type, from the outermost call down."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [frame.f_locals for frame in frames if frame.f_code.co_name == "adapt_typehints"]


def _entries(error: BaseException) -> list[str]:
    """The keys of mappings that lead to the value at fault."""
    return [str(scope["k"]) for scope in _scopes(error)[:-1] if "k" in scope]


def _no_attribute(module: str, name: str) -> str:
    if name == "py":
        return f"{module}.py is a file; give the import path of a class or function in it, such as {module}.name"
    return f"module {module!r} has no {name!r}; {nearest(name, dir(import_module(module)))}"


def _read_as_file(causes: Sequence[BaseException]) -> str:
    """The name of a Python file that the parser has read as a configuration; else empty."""
    found = (re.match(r"Invalid content in sub-config file (.*)\.py: ", str(cause)) for cause in causes)
    return next((Path(match[1]).name for match in found if match), "")


def _read_as_text(reason: str, arguments: Sequence[str]) -> str:
    """The name of a Python file that was given for what is in it, and that the parser has read; else empty."""
    words = [word.partition("=")[2] or word for word in arguments]
    for file in (file for _, values in _pairs(arguments) for file in values):
        with suppress(OSError, yaml.YAMLError):
            words += [name[1:] for name, _ in _names(compose(Path(file).read_text(encoding="utf-8")))]
    scripts = [Path(word) for word in words if word.endswith(".py") and os.path.isfile(word)]
    read = {script.stem: script.read_text(encoding="utf-8", errors="replace") for script in scripts}
    return next((name for name, text in read.items() if any(x in reason for x in re.findall(r"\w.*\w", text))), "")


def _deepest(error: BaseException) -> list[BaseException]:
    """The chain of causes that names most keys and classes: of a union, the type that accepts most of the value."""

    def depth(chain: list[BaseException]) -> tuple[int, int]:
        texts = [str(cause).partition("\n")[0] for cause in chain]
        return sum(bool(KEY.match(text) or CLASS.search(text)) for text in texts), -texts[-1].count(".")

    return [error, *max((_deepest(cause) for cause in alternatives(error)), key=depth, default=[])]


def _arguments_of(class_path: str) -> list[str]:
    from jsonargparse import ArgumentParser

    parser, target = ArgumentParser(), resolve_name(class_path)
    add = parser.add_class_arguments if isinstance(target, type) else parser.add_function_arguments
    names: list[str] = add(target, fail_untyped=False)
    return names


def _refused_text(name: str, arguments: Sequence[str]) -> str:
    """Why YAML text in an option is refused, which the parser then takes for a string; else empty."""
    for word, after in zip(arguments, [*arguments[1:], ""], strict=False):
        option, _, value = word.partition("=")
        if option.startswith("--") and name and name == _last(option):
            try:
                compose(value or after)
            except RefusedText as error:
                return str(error.problem)
            except yaml.YAMLError:
                pass
    return ""


def _where(name: str, arguments: Sequence[str]) -> str:
    """File and line of the last configuration with this key or class; empty if an option after it has it."""
    for (option, value), files in reversed(_pairs(arguments)):
        for file in reversed(files):
            if place := _place(name, file):
                return place
        if name and not files and (f".{name}." in f".{option.lstrip('-').rstrip('+')}." or name == _last(value)):
            return ""
    return ""


def _pairs(arguments: Sequence[str]) -> list[tuple[tuple[str, str], list[str]]]:
    """Options with their values, and the files of those that name a configuration."""
    pairs = [(word.partition("="), after) for word, after in zip(arguments, [*arguments[1:], ""], strict=False)]
    given = [(option, value if mark else after) for (option, mark, value), after in pairs]
    return [(each, layers(each[1]) if each[0] in ("--config", "-c") else []) for each in given]


def _place(name: str, file: str, reason: BaseException | None = None) -> str:
    """File and line, for the start of a message; empty if the file does not have the key or class.

    Args:
        name: The key or class.
        file: Of the configuration.
        reason: An error in the file's text has the line itself.
    """
    if isinstance(reason, yaml.MarkedYAMLError):
        return f"{file}:{line_of(reason)}: "
    if not os.path.isfile(file):
        return ""
    try:
        node = compose(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        return f"{file}:{line_of(error)}: "
    lines = [line for found, line in _names(node) if found.endswith(f".{name}")]
    return f"{file}:{lines[0]}: " if name and lines else ""


def _names(node: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Every key of a YAML file, as a dotted path, and every value, with its line."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{path}.{str(key.value).rstrip('+')}"
            yield name, key.start_mark.line + 1
            yield from _names(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _names(item, path)
    elif node is not None:
        yield f".{node.value}", node.start_mark.line + 1
