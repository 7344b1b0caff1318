"""The public API changes only on purpose, and its types serve other people's projects."""

import difflib

import lit_ppo
from tests.helpers import api


def test_the_public_api_is_the_stored_one() -> None:
    stored, now = api.FILE.read_text(encoding="utf-8").splitlines(), api.text().splitlines()
    changed = [*difflib.unified_diff(stored, now, "tests/api.txt", "now", lineterm="", n=2)]
    advice = "if this is meant: python -m tests.helpers.api --write, and a line in CHANGELOG.md; see CONTRIBUTING.md"
    assert not changed, "\n".join([*changed, advice])


def test_every_public_name_can_be_imported_and_is_listed_by_dir() -> None:
    assert set(lit_ppo.__all__) <= set(dir(lit_ppo))
    assert [name for name in lit_ppo.__all__ if getattr(lit_ppo, name, None) is None] == []
    assert lit_ppo.__version__.count(".") == 2
