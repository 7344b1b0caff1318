"""The callbacks, one trick per file, imported as ``lit_ppo.callbacks``."""

import importlib
import inspect
import pkgutil
from typing import Any

if __name__ == "callbacks":
    raise ImportError("import lit_ppo.callbacks instead of callbacks: under two names every class would exist twice")

from lit_ppo.callbacks.base import PPOCallback, fire
from lit_ppo.callbacks.experience import Experience

__all__ = ["Experience", "PPOCallback", "fire"]

# Every callback class of every file here is exported: a new file needs no entry in a list.
for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
    for _name, _class in vars(importlib.import_module(_file.name)).items():
        if inspect.isclass(_class) and issubclass(_class, PPOCallback) and _class.__module__ == _file.name:
            globals()[_name] = _class
            __all__.append(_name)
__all__ = sorted({*__all__})


def __getattr__(name: str) -> Any:  # tells type checkers that names are added at run time
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; the tricks are {', '.join(__all__)}")
