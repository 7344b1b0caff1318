"""The examples in docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import lit_ppo

MODULES = sorted(m.name for m in pkgutil.walk_packages(lit_ppo.__path__, "lit_ppo.") if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0
