"""Resuming with another configuration: each change is reported, and a change that cannot take effect is refused."""

from typing import Any

from lit_ppo.run.errors import CommandError

IGNORED = ("config", "ckpt_path", "weights_only", "stages", "verify")
FIXED = {
    "seed_everything": "it determines the order of the data and all random numbers",
    "model.class_path": "the checkpoint holds the weights and states of that class",
    "model.init_args.actor": "its weights come from the checkpoint, and the reference is what the run started from",
    "model.init_args.critic": "its weights come from the checkpoint",
    "model.init_args.reference": "it is what the run started from",
    "model.init_args.actor_lora": "the checkpoint holds that adapter",
    "model.init_args.critic_lora": "the checkpoint holds that adapter",
    "model.init_args.model": "its weights come from the checkpoint",
    "model.init_args.tokenizer": "the weights were trained with its tokens",
    "data.class_path": "the checkpoint holds a position in data of that class",
    "report.prompts": "the report compares with samples from before the first update",
}
ABSENT = "(none)"
Changes = dict[str, tuple[Any, Any]]  # name -> old and new value


def changes(old: dict[str, Any], new: dict[str, Any]) -> Changes:
    """Values that differ between two configurations, by dotted name. Callbacks are matched by class.

    >>> changes({"a": {"b": 1, "c": 2}, "e": None}, {"a": {"b": 1, "c": 3}, "d": None, "e": {"f": 4}})
    {'a.c': (2, 3), 'e': (None, {'f': 4}), 'd': ('(none)', None)}
    """
    return _changes(old, new, "")


def check_changes(path: str, changed: Changes) -> None:
    """Refuse a change that cannot take effect in a resumed run.

    Raises:
        CommandError: Names the value, old and new.
    """
    for name, (was, now) in changed.items():
        reason = next((why for fixed, why in FIXED.items() if _contains(fixed, name) or _contains(name, fixed)), None)
        if reason is not None:
            raise CommandError(
                f"--ckpt_path {path}: {name} was {was!r}, now {now!r}, and cannot change within a run ({reason}); "
                "restore it, or start a new run from the exported model",
                exit_code=2,
            )


def _contains(name: str, inner: str) -> bool:
    return f"{inner}.".startswith(f"{name}.")


def describe_changes(changed: Changes) -> list[str]:
    """One line for each change, old -> new. An added or removed callback is one change.

    >>> describe_changes({"kl_coef": (0.05, 0.1), "trainer.callbacks.AdaptiveKL.target": (6.0, ABSENT)})
    ['kl_coef: 0.05 -> 0.1', 'trainer.callbacks.AdaptiveKL.target: 6.0 -> (none)']
    >>> describe_changes({"trainer.callbacks.AdaptiveKL": ("x.AdaptiveKL", ABSENT)})
    ['trainer.callbacks.AdaptiveKL: removed; its state is dropped']
    """
    lines = []
    for name, (was, now) in changed.items():
        is_callback = name.startswith("trainer.callbacks.") and name.count(".") == 2
        if is_callback and ABSENT in (was, now):
            lines.append(f"{name}: " + ("added; it starts anew" if was == ABSENT else "removed; its state is dropped"))
        else:
            lines.append(f"{name}: {was} -> {now}")
    return lines


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str) -> Changes:
    found: Changes = {}
    for key in old | new:
        name, was, now = f"{prefix}{key}", old.get(key, ABSENT), new.get(key, ABSENT)
        if name in IGNORED:
            continue
        if name == "trainer.callbacks":
            found |= _changed_callbacks(_by_class(was), _by_class(now))
        elif all(value == ABSENT or isinstance(value, dict) for value in (was, now)):
            found |= _changes({} if was == ABSENT else was, {} if now == ABSENT else now, f"{name}.")
        elif type(was) is not type(now) or was != now:
            found[name] = was, now
    return found


def _changed_callbacks(old: dict[str, Any], new: dict[str, Any]) -> Changes:
    found: Changes = {}
    for key in old | new:
        name, was, now = f"trainer.callbacks.{key}", old.get(key, {}), new.get(key, {})
        classes = was.get("class_path", ABSENT), now.get("class_path", ABSENT)
        if classes[0] != classes[1]:
            found[name] = classes
        if was and now:
            found |= _changes(was.get("init_args") or {}, now.get("init_args") or {}, f"{name}.")
    return found


def _by_class(callbacks: Any) -> dict[str, Any]:
    """Callbacks by the name of their class; another one of that class has a + behind it."""
    found: dict[str, Any] = {}
    given = [] if callbacks in (None, ABSENT) else callbacks if isinstance(callbacks, list) else [callbacks]
    for entry in given:
        name = entry["class_path"].rpartition(".")[2]
        while name in found:
            name += "+"
        found[name] = entry
    return found
