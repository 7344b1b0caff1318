"""Imports keep to the layers; tests mirror ``lit_ppo`` and share ``tests/helpers``."""

import ast
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import make_data, make_module, make_trainer

TESTS = Path(__file__).resolve().parent


def test_no_test_module_is_imported() -> None:
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [f"{getattr(node, 'module', '')}.{alias.name}" for alias in node.names]
                imported = [name for name in names if "tests." in name and ".test_" in name]
                assert not imported, f"{path}:{node.lineno} imports {imported[0]}; move it to tests/helpers"


def test_folders_and_files_mirror_the_package() -> None:
    folders = {path.name for path in (TESTS.parent / "lit_ppo").iterdir() if (path / "__init__.py").exists()}
    found = {path.name for path in TESTS.iterdir() if (path / "__init__.py").exists()}
    assert found == folders | {"golden", "gpu", "helpers"}


def test_imports_keep_the_contracts() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rooms_stay_small() -> None:
    """At most 300 lines a file and a dozen modules a folder; the equations and the tricks may have more."""
    product = TESTS.parent / "lit_ppo"
    folders = [path for path in product.iterdir() if (path / "__init__.py").exists() and path.name != "callbacks"]
    files = [*product.rglob("*.py"), *(TESTS.parent / "callbacks").glob("*.py")]
    assert {p.name for p in files if len(p.read_text().splitlines()) > 300} == {"functional.py"}
    assert not [path.name for path in folders if len([*path.glob("*.py")]) > 12 + 1]  # with __init__.py


def test_an_update_meets_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a newcomer has to open to follow the second update: each file of ours in which a function is called."""
    module = make_module(make_causal_lm(tmp_path / "actor"), ppo_epochs=1, minibatch_size=4, micro_batch_size=None)
    met: set[Path] = set()
    step = module.training_step

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename).resolve()
        if event == "call" and {TESTS.parent / "lit_ppo", TESTS.parent / "callbacks"} & set(path.parents):
            met.add(path)

    def traced(*args: Any) -> None:
        sys.setprofile(note if module.rollouts else None)
        try:
            step(*args)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(module, "training_step", traced)
    make_trainer(tmp_path).fit(module, make_data(tmp_path, batch_size=4))
    assert 10 < len(met) <= 14, sorted(map(str, met))
