"""Installing: the wheel, ``pip install .``, ``pip install -e .``, and a clone whose link is a text file."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.helpers.command import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib

OFFLINE = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
FIND = "from importlib.util import find_spec; print(find_spec('lit_ppo.callbacks').origin)"
IMPORT = "import lit_ppo.callbacks; print(lit_ppo.callbacks.AdaptiveKL.__module__)"


def sources(target: Path, *, link: str) -> Path:
    """A copy of the project, the link as git makes it or as a text file."""
    for name in ("lit_ppo", "callbacks", "configs"):
        shutil.copytree(
            REPOSITORY / name, target / name, ignore=lambda _, names: {"__pycache__", "callbacks"} & set(names)
        )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, target / name)
    if link == "link":
        (target / "lit_ppo/callbacks").symlink_to("../callbacks")
    else:
        (target / "lit_ppo/callbacks").write_text("../callbacks")
    return target


def run(*command: str | Path, cwd: Path) -> str:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # wins over what is installed
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(path: Path) -> Path:
    """An environment that has everything but this project: its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path.parent)
    folder = (
        "Lib/site-packages"
        if sys.platform == "win32"
        else f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    )
    # A path file in a path file is not read: an editable install of this project stays out.
    (path / folder / "outer.pth").write_text(sysconfig.get_path("purelib"))
    return path / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


@pytest.mark.parametrize("link", ["text", "link"])
def test_editable_install(tmp_path: Path, link: str) -> None:
    project, python = sources(tmp_path / "project", link=link), environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", *OFFLINE, "-e", project, cwd=tmp_path)
    found = Path(run(python, "-c", FIND, cwd=tmp_path).strip()).resolve()
    assert found == (project / "callbacks/__init__.py").resolve()  # what is edited is what is imported
    if link == "text":
        assert run(python, "-c", IMPORT, cwd=tmp_path).strip() == "lit_ppo.callbacks.adaptive_kl"
    command = [str(python), "-c", "import callbacks"]
    refused = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "import lit_ppo.callbacks instead of callbacks" in refused.stderr


def assert_types_serve_others(python: Path, folder: Path) -> None:
    """``py.typed`` counts for mypy, and a project with subclasses of ours passes in strict mode."""
    shutil.copy(REPOSITORY / "tests/typed/project.py", folder)
    if (REPOSITORY / ".mypy_cache").exists():  # of the libraries; without it, this takes a minute
        shutil.copytree(REPOSITORY / ".mypy_cache", folder / "cache")
    options = ["--config-file", REPOSITORY / "pyproject.toml", "--python-executable", python, "--cache-dir", "cache"]
    assert "Success" in run(sys.executable, "-m", "mypy", "--strict", *options, "project.py", cwd=folder)


def assert_links_are_absolute(metadata: str) -> None:
    """Of the README as PyPI shows it; those that are relative in a clone lead to the repository."""
    links, here = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", metadata), "https://github.com/lit-ppo/lit-ppo/"
    written = re.findall(r"\]\(([^)]*)\)", (REPOSITORY / "README.md").read_text())
    assert [link for _, link in links] == [
        link if link.startswith("https:") else f"{here}{'raw' if link.endswith('.png') else 'blob'}/main/{link}"
        for link in written
    ]
    assert {bool(picture) for picture, link in links if f"{here}raw/" in link} == {True}
    assert f"Project-URL: Repository, {here[:-1]}\n" in metadata


@pytest.mark.parametrize("link", ["text", "link"])
def test_wheel(tmp_path: Path, link: str) -> None:
    project, python = sources(tmp_path / "project", link=link), environment(tmp_path / "venv")
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "-w", tmp_path / "out", project, cwd=tmp_path)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tricks = {f"lit_ppo/callbacks/{path.name}" for path in (project / "callbacks").glob("*.py")}
    ours = {path.relative_to(project).as_posix() for path in (project / "lit_ppo").rglob("*.py")} - tricks
    configs = {f"lit_ppo/{path.relative_to(project).as_posix()}" for path in (project / "configs").rglob("*.yaml")}
    assert names == {*ours, *tricks, *configs, "lit_ppo/py.typed"}
    (metadata,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    assert_links_are_absolute(zipfile.ZipFile(wheel).read(metadata).decode())
    run(python, "-m", "pip", "install", *OFFLINE, wheel, cwd=tmp_path)
    assert Path(run(python, "-c", FIND, cwd=tmp_path).strip()).is_relative_to(tmp_path / "venv")
    assert list(python.parent.glob("lit-ppo*"))
    if link == "link":
        assert_types_serve_others(python, tmp_path)


def test_the_link_is_tracked_as_a_link() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a clone")
    entry = run("git", "ls-files", "-s", "lit_ppo/callbacks", cwd=REPOSITORY)
    assert entry.startswith("120000 ")


def requirements(*, extras: bool) -> set[str]:
    """Names of the packages that pyproject.toml asks for."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    more = [r for extra in project["optional-dependencies"].values() for r in extra] if extras else []
    return {re.split(r"[\[<>=~; ]", requirement)[0].lower() for requirement in [*project["dependencies"], *more]}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_what_is_imported_is_declared_and_nothing_else() -> None:
    trees = [ast.parse(path.read_text()) for path in (REPOSITORY / "lit_ppo").glob("**/*.py")]
    trees += [ast.parse(path.read_text()) for path in (REPOSITORY / "callbacks").glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in imported} - {*sys.stdlib_module_names, "lit_ppo"}
    distributions = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    extras = {"peft", "shtab", "vllm"}
    assert {distributions.get(name, name) for name in packages} - extras == requirements(extras=False)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_address_of_the_project_is_one() -> None:
    """``Repository`` in pyproject.toml is what the manual links to and what people clone."""
    urls = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["urls"]
    assert urls.keys() == {"Homepage", "Documentation", "Repository", "Changelog", "Issues"}
    address = urls["Repository"]
    assert [url for url in urls.values() if not f"{url}/".startswith(f"{address}/")] == []
    for link in urls.values():
        if "/blob/main/" in link:
            assert (REPOSITORY / link.partition("/blob/main/")[2]).is_file()
    assert f"\nrepo_url: {address} " in (REPOSITORY / "mkdocs.yml").read_text()
    for page in ("README.md", "docs/index.md"):
        assert f"git clone {address} && cd {address.rpartition('/')[2]}" in (REPOSITORY / page).read_text()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_pins_cover_the_dependencies_and_are_plain() -> None:
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.split("==")[0].lower() for line in lines}
    assert requirements(extras=True) - {"vllm"} <= pinned  # vLLM pins its own torch, in an environment of its own
    assert "torch==2.13.0" in lines
    assert not [line for line in lines if "+" in line.split(";")[0]]  # no local versions
