"""Configuration files: in layers, ``base: ppo.yaml`` at the top of a file applies that file first; and their text."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import yaml

from lit_ppo.cli import shipped
from lit_ppo.run.errors import CommandError

DEPTH = 100  # levels of nesting in a text, aliases expanded
REPEATED = 1_000  # values that aliases may repeat in a text
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # not every build of PyYAML has the one in C
TAG = "tag:yaml.org,2002:"


class RefusedText(yaml.MarkedYAMLError):
    """Valid YAML that says two things at once, or more than a parser can hold."""


def layers(file: str) -> list[str]:
    """The files that a configuration stands for: the lowest base first, the file itself last.

    Args:
        file: Its path, or the name of one that comes with the package; YAML text and URLs stay as they are.
    """
    files = [shipped.find(file)]
    if shipped.is_name(file) and not shipped.is_file(files[0]):
        raise CommandError(
            f"--config {file}: file does not exist, nor is it a name; {shipped.nearest(file)}", exit_code=2
        )
    while (base := _base(files[0])) is not None:
        if base in files:
            _refuse(files[0], f"{base} is based on this file; remove one of the two")
        if not os.path.isfile(base):
            problem = f"file {base} does not exist; give a path relative to this file, or a name"
            _refuse(files[0], f"{problem}; {shipped.nearest(base)}")
        files.insert(0, base)
    return files


def check_additions(arguments: Sequence[str]) -> None:
    """Refuse a file that adds callbacks before one that replaces all of them, which would drop the added ones.

    A file may replace the callbacks of a job, which has a list of its own.

    Args:
        arguments: Of the command line.

    Raises:
        CommandError: Names both files.
    """
    adding: list[str] = []  # the file that adds callbacks, and the configuration that it is a part of
    for option, value in _options(arguments):
        files, replaces = layers(value) if option == "--config" else [option], False
        for file in files:
            keys = _callback_keys(file) if option == "--config" else {"callbacks"}
            if "callbacks" in keys and adding:
                given = option if option != "--config" else value
                names = (adding[1], given) if adding[1] != given else (adding[0], file)
                trick, job = (shipped.name_of(name) or name for name in names)
                raise CommandError(
                    f"--config {trick}: the callbacks that it adds would have no effect, since {job} comes later and "
                    f"replaces all callbacks; give {job} first, or let it add its own with callbacks+",
                    exit_code=2,
                )
            replaces = replaces or "callbacks" in keys
            if "callbacks+" in keys and not replaces:
                adding = [file, value]


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Configurations and replaced callbacks, in order; null for callbacks means none, and says so."""
    for word, after in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        value = value if equals else after
        if (option == "--config" and value) or (option == "--trainer.callbacks" and value not in ("null", "[]")):
            yield option, value


def _callback_keys(file: str) -> set[str]:
    """Whether a file, or YAML text, has ``callbacks``, ``callbacks+``, both or none of them."""
    is_text = not shipped.is_name(file) and "://" not in file
    if not is_text and not os.path.isfile(file):
        return set()  # a URL or a pipe, which can be read once
    node = None
    with suppress(yaml.YAMLError):  # the parser reports it
        node = compose(file if is_text else Path(file).read_text(encoding="utf-8"))
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    inner = [value.value for key, value in pairs if key.value == "trainer" and isinstance(value, yaml.MappingNode)]
    names = {key.value for part in inner for key, _ in part}
    names |= {str(key.value).removeprefix("trainer.") for key, _ in pairs if str(key.value).startswith("trainer.")}
    return names & {"callbacks", "callbacks+"}


def _base(file: str) -> str | None:
    if not os.path.isfile(file):
        return None  # a URL or YAML text, or missing: the parser reads it or reports it
    try:
        node = compose(Path(file).read_text(encoding="utf-8"))
    except RefusedText as error:
        raise CommandError(f"{file}:{line_of(error)}: {error.problem}", exit_code=2) from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{file}: not UTF-8 text, at byte {error.start}; save it as UTF-8", exit_code=2) from error
    except OSError as error:
        raise CommandError(f"{file}: cannot be read ({error.strerror}); check its permissions", exit_code=2) from error
    except yaml.YAMLError:
        return None  # the parser reports it
    if not isinstance(node, yaml.MappingNode):
        raise CommandError(f"{file}: has no keys; give sections such as trainer:, or leave the file out", exit_code=2)
    found: list[yaml.Node] = [value for key, value in node.value if key.value == "base" and value.tag != f"{TAG}null"]
    if not found:
        return None
    if not isinstance(found[0], yaml.ScalarNode) or not found[0].value:
        _refuse(file, "must be the path of a configuration file, relative to this file")
    return shipped.find(str(found[0].value), Path(file).parent)


def _refuse(file: str, problem: str) -> NoReturn:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    number = next((number for number, line in enumerate(lines, 1) if line.startswith("base")), 1)
    raise CommandError(f"{file}:{number}: base: {problem}", exit_code=2)


def load(text: str) -> Any:
    """The values of YAML or JSON text: the parser's loader, with the checks of :func:`compose`."""
    from jsonargparse import get_loader
    from jsonargparse._util import config_load_stack

    try:
        compose(text)
        return get_loader("yaml")(text)
    except yaml.YAMLError as error:
        for path, name in config_load_stack.get()[-1:]:  # the file that the parser is reading
            if os.path.isfile(path) and Path(path).read_text(encoding="utf-8", errors="replace") == text:
                error.file = name  # type: ignore[attr-defined]  # for the message
        raise
    except ValueError as error:  # Python reads no integer of thousands of digits
        raise RefusedText(problem=f"a number cannot be read: {str(error).partition(';')[0]}") from error


def compose(text: str) -> yaml.Node | None:
    """The nodes of YAML or JSON text.

    Raises:
        yaml.YAMLError: The text is not YAML, a mapping has a key twice, nesting or aliases go too far, or a class is
            not written as ``class_path`` and ``init_args``.
    """
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):  # before nodes are built, which recurses
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            _refuse_node(event, f"more than {DEPTH} levels of brackets or indentation; write it flatter")
    node: yaml.Node | None = yaml.compose(text, Loader=LOADER)
    if node is not None:
        _measure(node, {})
    if isinstance(node, yaml.MappingNode):
        _check_sections(node)
    return node


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Values and levels of a node with all its aliases expanded; ``known`` holds those of earlier nodes."""
    if id(node) in known:
        if not known[id(node)][0]:
            _refuse_node(node, "an alias stands for what it is part of; write out what is needed")
        return known[id(node)]
    known[id(node)] = 0, 0
    items = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        items = [item for pair in items for item in pair]
    measured = [_measure(item, known) for item in items]
    size, height = 1 + sum(size for size, _ in measured), 1 + max((height for _, height in measured), default=0)
    if size - len(known) > REPEATED or height > DEPTH:
        _refuse_node(node, f"aliases repeat more than {REPEATED:,} values or {DEPTH} levels; write out what is needed")
    known[id(node)] = size, height
    return size, height


def _check_keys(mapping: yaml.MappingNode) -> None:
    """Check that no key is there twice, and the form of a class."""
    lines: dict[tuple[str, str], int] = {}
    for key, value in mapping.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == f"{TAG}merge":
            continue  # all merge keys count, and a mapping's own keys override theirs
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in lines:
            first = lines[name]
            _refuse_node(key, f"key {key.value!r} stands in line {first} and again in line {line}; keep one of them")
        lines[name] = line
        if key.value == "init_args" and not isinstance(value, yaml.MappingNode):
            _refuse_node(key, f"init_args: expected a mapping, got {_shown(value)}; give arguments below it")
        if key.value == "class_path" and (value.tag != f"{TAG}str" or not value.value):
            _refuse_node(key, f"class_path: expected the name of a class, got {_shown(value)}")


def _shown(node: yaml.Node) -> str:
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else "several values"


def _check_sections(root: yaml.MappingNode) -> None:
    """Refuse ``trainer.max_steps`` beside ``trainer``, which would replace it."""
    lines = {key.value: key.start_mark.line + 1 for key, _ in root.value if isinstance(key, yaml.ScalarNode)}
    for key, _ in root.value:
        section = str(key.value).partition(".")[0]
        if section != key.value and section in lines:
            _refuse_node(key, f"{key.value!r} stands beside {section!r} of line {lines[section]}; move it below that")


def _refuse_node(node: Any, problem: str) -> NoReturn:
    raise RefusedText(problem=problem, problem_mark=node.start_mark)


def line_of(error: yaml.YAMLError) -> int:
    """The line at fault, from 1."""
    mark = getattr(error, "problem_mark", None)
    return 1 if mark is None else int(mark.line) + 1
