"""The docstrings: their examples are true, and no public method is without one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import lit_ppo

MODULES = sorted(m.name for m in pkgutil.walk_packages(lit_ppo.__path__, "lit_ppo.") if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_public_methods_have_a_docstring_unless_they_override(name: str) -> None:
    module = importlib.import_module(name)
    classes = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == name]
    bare = [
        method.__qualname__
        for cls in classes
        for key, method in vars(cls).items()
        if inspect.isfunction(method) and not key.startswith("_") and not hasattr(super(cls, cls), key)
        if not inspect.getdoc(method)
    ]
    assert bare == []
