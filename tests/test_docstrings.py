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
def test_public_methods_have_a_docstring_or_override_one_that_has(name: str) -> None:
    module = importlib.import_module(name)
    classes = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == name]
    methods = [getattr(cls, key) for cls in classes for key, value in vars(cls).items() if inspect.isfunction(value)]
    public = [method for method in methods if not method.__name__.startswith("_")]
    assert [method.__qualname__ for method in public if not inspect.getdoc(method)] == []
