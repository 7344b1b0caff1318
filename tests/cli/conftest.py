"""Fixtures of the command's tests."""

from pathlib import Path

import pytest
import yaml

from tests.helpers.cli_toys import CONFIG


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of eight steps."""
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path
