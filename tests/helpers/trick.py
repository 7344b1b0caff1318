"""How a trick is tried by the tests that run over all of them; each trick's test file has one."""

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lit_ppo.callbacks

Arguments = dict[str, Any] | Callable[[], dict[str, Any]]


class Trick(NamedTuple):
    """``TRICK = {"MyTrick": Trick(...)}`` in ``tests/callbacks/test_my_trick.py``.

    Args:
        acts: Arguments with which it changes four updates of the toy, and with which a forgotten state shows; a
            function where they have to be made anew each time.
        refuses: Arguments that the constructor refuses, by name.
        knobs: For each argument two sets of arguments, laid over ``acts``, that differ in it (and in what else it
            needs) and whose runs on the toy differ.
        needs: The model, or models, without which it refuses to start.
        twice: Whether two copies may stand side by side.
        toy: Arguments of the toy on which it acts.
        monitor: Whether it only watches: then it must leave the run as it is, to the bit, and what is logged differs.
        live: Laid over ``acts`` where it is tried on LitPPO instead, in a folder with ``prompts.jsonl`` (columns
            ``prompt``, ``level``) and ``texts.jsonl`` (column ``text``).
    """

    acts: Arguments
    refuses: dict[str, Any]
    knobs: dict[str, tuple[dict[str, Any], dict[str, Any]]]
    needs: str | tuple[str, ...] | None = None
    twice: bool = False
    toy: dict[str, Any] = {}
    monitor: bool = False
    live: Arguments = {}

    @property
    def needed_models(self) -> tuple[str, ...]:
        """``needs`` as a tuple."""
        return (self.needs,) if isinstance(self.needs, str) else self.needs or ()


@cache
def tricks() -> dict[str, Trick]:
    """The ``TRICK`` of every test file in ``tests/callbacks``, by the class's name."""
    files = sorted((Path(__file__).parents[1] / "callbacks").glob("test_*.py"))
    modules = [importlib.import_module(f"tests.callbacks.{file.stem}") for file in files if "contract" not in file.stem]
    return {name: trick for module in modules for name, trick in getattr(module, "TRICK", {}).items()}


def make_trick(name: str, *, live: bool = False, **arguments: Any) -> Any:
    """A callback with the arguments of its ``acts`` (and ``live``), and these on top of them."""
    trick = tricks()[name]
    given = made(trick.acts) | (made(trick.live) if live else {}) | arguments
    return getattr(lit_ppo.callbacks, name)(**given)


def made(arguments: Arguments) -> dict[str, Any]:
    """The arguments, made anew where they are a function."""
    return arguments() if callable(arguments) else dict(arguments)
