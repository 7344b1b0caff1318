"""What a callback reads and writes: it is given stand-ins that note it."""

from typing import Any

import lightning as L

from lit_ppo.callbacks.hooks import HOOKS

LIGHTNINGS = ("setup", "on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_end")
Seen = dict[str, set[str]]  # reads and writes of "rows", "module", "metrics" and "losses"


class StandIn:
    """Passes everything on to an object and notes it."""

    def __init__(self, of: Any, name: str, seen: Seen) -> None:
        vars(self).update(_of=of, _name=name, _seen=seen)

    @property
    def __class__(self) -> Any:
        return type(self._of)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            self._seen.setdefault(f"{self._name} read", set()).add(name)
        value = getattr(self._of, name)
        return through(value) if self._name == "module" and callable(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        self._seen.setdefault(f"{self._name} written", set()).add(name)
        setattr(self._of, name, value)

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, key: str) -> bool:
        self._seen.setdefault(f"{self._name} read", set()).add(key)
        return key in self._of

    def __getitem__(self, key: str) -> Any:
        self._seen.setdefault(f"{self._name} read", set()).add(key)
        return self._of[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._seen.setdefault(f"{self._name} written", set()).add(key)
        self._of[key] = value

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if self.__contains__(key) else default

    def clear(self) -> None:
        self._of.clear()


def through(function: Any) -> Any:
    """A method of the module, called with the objects themselves; what it reads is not the callback's."""
    if not hasattr(function, "__func__"):
        return function
    return lambda *args, **kwargs: function(*(vars(x)["_of"] if type(x) is StandIn else x for x in args), **kwargs)


def traced(callback: L.Callback, seen: Seen) -> L.Callback:
    """The callback, whose hooks get stand-ins."""

    def wrap(hook: str, function: Any) -> Any:
        names = ["rows" if name in ("experience", "minibatch") else name for name in HOOKS.get(hook, "").split(", ")]

        def wrapped(trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            if hook in HOOKS:
                args = tuple(
                    StandIn(x, name, seen) if name != "prompts" else x for x, name in zip(args, names, strict=True)
                )
            before = set(seen.get("module read", ()))
            function(trainer, StandIn(pl_module, "module", seen), *args, **kwargs)
            if hook == "setup":  # which only asks whether it is there
                seen["module read"] = before

        return wrapped

    for hook in (*HOOKS, *LIGHTNINGS):
        if getattr(type(callback), hook) is not getattr(L.Callback, hook, None):
            setattr(callback, hook, wrap(hook, getattr(callback, hook)))
    return callback
