"""The manual: commands and files exist, code runs, quoted messages are in the code, the reference is complete."""

import ast
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import lit_ppo
import lit_ppo.callbacks
from lit_ppo.cli.command import Command
from lit_ppo.cli.session import Session
from lit_ppo.run.errors import CommandError
from tests.helpers.command import REPOSITORY
from tests.helpers.manual import CONFIGS, DOCS, EXAMPLES, PAGES, blocks, commands, lit_ppo_arguments, shipped

GENERATED: dict[str, Any] = runpy.run_path(str(DOCS / "tools/pages.py"))
SUBCOMMANDS = ("fit", "validate", "test", "predict")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a reader: with the files that the pages tell to save."""
    folder = tmp_path_factory.mktemp("reader")
    for path in EXAMPLES.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for page in PAGES:
        for title, text in re.findall(r"^```\w+ title=\"([\w.]+)\"\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL):
            if not text.startswith("--8<--"):
                (folder / title).write_text(text)
    (folder / "my_rewards.py").write_text("def short(responses):\n    return [-float(len(r)) for r in responses]\n")
    (folder / "migrated.yaml").write_text(blocks("yaml", "from_trl.md")[0])
    return folder


PARSED = sorted(
    {
        tuple(word for word in lit_ppo_arguments(command) if word != "--print_config")
        for page in PAGES
        for command in commands(page)
        if {"lit-ppo", "lit_ppo"} & {*command} and {*SUBCOMMANDS} & {*command}
    }
)


def test_there_are_commands() -> None:
    assert len(PARSED) > 25


def refused(arguments: Iterable[Sequence[str]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the command's own parser says against arguments of ``lit-ppo``, in the working directory of a reader."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    errors: list[str] = []

    class Parser(Command):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            for given in arguments:
                try:
                    self._parse(parser, [*given])
                except CommandError as error:
                    errors.append(f"{shlex.join(given)}: {error}")
            raise StopIteration

    with pytest.raises(StopIteration):
        Parser(Session(["fit"], debug=False))
    return errors


def test_commands_parse(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file, class and option of each command of ``lit-ppo`` on any page."""
    assert refused(PARSED, folder, monkeypatch) == []


def test_other_commands_name_what_exists(folder: Path) -> None:
    known = {
        "pip",
        "tensorboard",
        "torchrun",
        "lit-ppo",
        "hf",
        ".",
        "python3",
        "mkdocs",
        "export",
        "vllm",
        "git",
        "cd",
        "mkdir",
        "echo",
    }
    scripts = {path.name for path in folder.iterdir()}
    for page in PAGES:
        for command in commands(page):
            if command[0] == "python":
                name = command[2] if command[1] == "-m" else command[1]
                exists = find_spec(name) if command[1] == "-m" else name in scripts or (REPOSITORY / name).is_file()
                assert exists, (page, name)
            else:
                assert command[0] in known, (page, command)


def test_files_and_configurations_exist() -> None:
    """Links are checked by ``mkdocs build --strict``; here those that leave the manual, and names in text."""
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((\.\./[^)#\s]+)", text):
            path = (DOCS / page).parent / link
            generated = path.resolve().relative_to(REPOSITORY / "docs").as_posix() if "reference/" in link else ""
            assert path.exists() or generated in GENERATED["pages"](), (page, link)
        for name in re.findall(r"--config (?:configs/)?([\w/]+)(?:\.yaml)?", text):
            exists = (CONFIGS / f"{name}.yaml").is_file() or (EXAMPLES / f"{name}.yaml").is_file()
            assert exists or name in ("migrated", "my", "my_rewards", "tricks/NAME",
                "runs/quickstart/ppo/version_0/config", "runs/gsm8k/version_0/config",
                "runs/ppo/version_0/config"), (page, name)  # fmt: skip


def test_code_comes_from_tested_scripts() -> None:
    """Python is included, except in two pages whose blocks other tests run."""
    tested = (REPOSITORY / "tests/test_examples.py").read_text()
    for page, text in PAGES.items():
        for block in blocks("python", page):
            if match := re.fullmatch(r'--8<-- "examples/(\w+\.py)(?::\w+)?"\n', block):
                assert match[1] in tested, f"no test runs {match[1]}"
            else:
                assert page in ("from_trl.md", "own_module.md"), f"{page}: include a script from examples/"
                compile(block, page, "exec")
        for name in re.findall(r'--8<-- "([\w/.]+)', text):
            assert (REPOSITORY / name).is_file(), (page, name)


def test_settings_parse(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML on any page, applied on top of ``ppo``."""
    overlays = [block for page in PAGES for block in blocks("yaml", page) if not block.startswith("--8<--")]
    for number, overlay in enumerate(overlays):
        (folder / f"{number}.yaml").write_text(overlay)
    arguments = [["fit", *shipped("ppo"), "--config", f"{number}.yaml"] for number in range(len(overlays))]
    assert len(overlays) > 3
    assert refused(arguments, folder, monkeypatch) == []


def test_options_in_text_parse(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options with a value, on top of ``ppo``, or of what the page is about."""
    bases = {"tutorials/gsm8k.md": "grpo", "monitoring.md": "monitors/reward_hacking_monitor"}
    arguments = [
        ["fit", *shipped("ppo"), *shipped(bases.get(page, "ppo")), *lit_ppo_arguments(["lit-ppo", *shlex.split(code)])]
        for page, text in PAGES.items()
        for code in re.findall(r"`(--\w[^`\n]*[ =][^`\n]+)`", text)
        if page not in ("how_to/export.md", "performance.md") and not re.search("NAME|DIR|print_config|logger", code)
    ]
    assert len(arguments) > 20
    assert refused(arguments, folder, monkeypatch) == []


@cache
def messages() -> list[str]:
    """The constant parts of every text in the code, with ``\\0`` where a value is put in."""
    texts: list[str] = []
    for path in [*(REPOSITORY / "lit_ppo").rglob("*.py"), *(REPOSITORY / "callbacks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_quoted_messages_are_in_the_code() -> None:
    """Each part between dots, as long as it has words."""
    quoted = re.findall(r"^### `(.*)`$", PAGES["how_to/troubleshooting.md"], re.MULTILINE)
    assert len(quoted) > 50
    missing = []
    for message in quoted:
        for part in message.split("..."):
            words = part.strip(" ;,:")
            if re.search(r"\w+ \w+", words) and not any(words in text for text in messages()):
                missing.append((message, words))
    assert missing == []


def test_every_public_name_has_a_place() -> None:
    """Of both packages; mkdocs fails where the target of a link is missing."""
    names = GENERATED["public_names"]()
    expected = {f"lit_ppo.{name}" for name in lit_ppo.__all__}
    expected |= {f"lit_ppo.callbacks.{name}" for name in lit_ppo.callbacks.__all__}
    assert {name for name in expected if not name.rpartition(".")[2].startswith("__")} == names.keys()
    for name, identifier in names.items():
        home, _, attribute = name.rpartition(".")
        found = getattr(sys.modules[home], attribute)
        assert f"{found.__module__}.{found.__qualname__}" == identifier


def test_every_module_is_in_the_reference() -> None:
    pages = GENERATED["pages"]()
    shown = {name for text in pages.values() for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}
    expected = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for path in (REPOSITORY / "lit_ppo").rglob("*.py")
    }
    for path in (REPOSITORY / "callbacks").glob("*.py"):
        expected.add(f"lit_ppo.callbacks.{path.stem}".removesuffix(".__init__"))
    missing = {m for m in expected if m not in shown and not any(name.startswith(f"{m}.") for name in shown)}
    assert missing <= {"lit_ppo.__main__"}


def test_every_logged_metric_has_a_meaning() -> None:
    """Those that eleven jobs have logged, and those that the code names."""
    record = json.loads((REPOSITORY / "tests/golden/record.json").read_text())
    logged = {tag for tag in _keys(record) if "/" in tag}
    page = GENERATED["metrics_page"]()
    for path in [*(REPOSITORY / "lit_ppo/ppo").glob("*.py"), *(REPOSITORY / "callbacks").glob("*.py")]:
        logged |= set(re.findall(r'"((?:objective|policy|value|response|data|ptx|reward|tax|hacking|memory|optimizer|'
            r'rollout|rejection|throughput)/\w+)"', path.read_text()))  # fmt: skip
    assert len(logged) > 40
    names = {"good", "model", "other"}  # of rewards
    tags = {re.sub(rf"/({'|'.join(names)})$", "/<name>", tag) for tag in logged}
    assert {tag for tag in tags if f"`{tag}`" not in page} == set()


def _keys(value: Any) -> Iterator[str]:
    """All keys of nested mappings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _keys(inner)


def test_every_configuration_is_in_the_reference() -> None:
    page = GENERATED["configurations_page"]()
    for path in CONFIGS.rglob("*.yaml"):
        assert f"### {path.relative_to(CONFIGS).with_suffix('').as_posix()}\n" in page
        assert path.read_text() in page
        yaml.safe_load(path.read_text())


def test_every_trick_and_estimator_is_explained() -> None:
    page = PAGES["explanation/tricks.md"]
    tricks = set(lit_ppo.callbacks.__all__) - {"Experience", "PPOCallback", "fire"}
    for name in [*tricks, "GAE", "GroupRelative", "LeaveOneOut", "Reinforce"]:
        assert re.search(rf"^\| \[`{name}`\]\[lit_ppo\.[\w.]*{name}\] \| .*\(https?://", page, re.MULTILINE), name
