"""The suite mirrors ``lit_ppo``; what test modules share lies in ``tests/helpers``."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


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
    assert found == folders | {"golden", "helpers"}
