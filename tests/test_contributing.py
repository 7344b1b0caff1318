"""CONTRIBUTING.md names only what exists, and shows the layers and the arrow as they are."""

import ast
import re
import sys

import pytest

from lit_ppo.callbacks.base import HOOKS
from tests.helpers.command import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib

PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text()


def cells(heading: str) -> list[list[str]]:
    """The rows of the table under a heading."""
    lines = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


def defined(path: str) -> set[str]:
    """Names at the top level of a module."""
    names: set[str] = set()
    for node in ast.parse((REPOSITORY / path).read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_every_path_exists() -> None:
    words = {word for text in re.findall(r"`([^`\n]+)`", PAGE) for word in text.split()}
    paths = {word for word in words if re.fullmatch(r"[\w.]+(/[\w.]*)+|\w+\.(py|md|toml|json)", word)}
    assert len(paths) > 30
    assert {path for path in paths if not (REPOSITORY / path).exists() and "my_trick" not in path} == set()


def test_every_name_is_in_its_file() -> None:
    found = [(name, path) for _, file, names, _ in cells("The arrow") for path in re.findall(r"[\w/.]+", file)
             for name in re.findall(r"\w+", names)]  # fmt: skip
    found += re.findall(r"`(\w+)` (?:in |\()`([\w/]+\.py)`", PAGE)
    assert len(found) > 20
    assert [(name, path) for name, path in found if name not in defined(path)] == []


def test_hooks_are_in_the_order_of_the_arrow() -> None:
    assert [hook for *_, hooks in cells("The arrow") for hook in re.findall(r"\w+", hooks)] == list(HOOKS)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_layers_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    shown = [set(re.findall(r"`(?:lit_ppo/)?(\w+)(?:/|\.py)`", first)) for first, _ in cells("Layout")]
    assert shown[: len(layers)] == [set(re.findall(r"\w+", layer)) for layer in layers]
