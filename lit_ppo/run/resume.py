"""A run continued with another configuration: what has changed is said, what cannot change is refused."""

from typing import Any

from lit_ppo.run.errors import CommandError

IGNORED = ("config", "ckpt_path", "weights_only", "stages")
FIXED = {
    "seed_everything": "the order of the data and every draw come from it",
    "model.class_path": "the checkpoint holds the weights and states of that class",
    "model.init_args.actor": "its weights come from the checkpoint, and the reference is what the run started from",
    "model.init_args.critic": "its weights come from the checkpoint",
    "model.init_args.reference": "it is what the run started from",
    "model.init_args.actor_lora": "the checkpoint holds that adapter",
    "model.init_args.critic_lora": "the checkpoint holds that adapter",
    "model.init_args.model": "its weights come from the checkpoint",
    "model.init_args.tokenizer": "the weights know that one's tokens",
    "data.class_path": "the place in the data was saved by that class",
    "report.prompts": "the report compares with what was sampled before the first update",
}
ABSENT = "(none)"
Changes = dict[str, tuple[Any, Any]]


def changes(old: dict[str, Any], new: dict[str, Any]) -> Changes:
    """Values that differ between two configurations, by their dotted names; callbacks are told apart by class.

    >>> changes({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None})
    {'a.c': (2, 3), 'd': ('(none)', None)}
    """
    one, other = _flat(old), _flat(new)
    names = [*one, *(name for name in other if name not in one)]
    pairs = {name: (one.get(name, ABSENT), other.get(name, ABSENT)) for name in names}
    return {name: (was, now) for name, (was, now) in pairs.items() if type(was) is not type(now) or was != now}


def check_changes(path: str, changed: Changes) -> None:
    """Refuse what cannot take effect in a run that goes on.

    Raises:
        CommandError: Names the value, old and new.
    """
    for name, (was, now) in changed.items():
        reason = next((why for fixed, why in FIXED.items() if f"{name}.".startswith(f"{fixed}.")), None)
        if reason is not None:
            raise CommandError(
                f"--ckpt_path {path}: {name} was {was!r}, now {now!r}, and cannot change within a run ({reason}); "
                "restore it, or start a new run from the exported model",
                exit_code=2,
            )


def tell_changes(changed: Changes) -> list[str]:
    """One line for each change, old -> new; an added or removed callback is one change.

    >>> tell_changes({"kl_coef": (0.05, 0.1), "trainer.callbacks.AdaptiveKL.target": (6.0, ABSENT)})
    ['kl_coef: 0.05 -> 0.1', 'trainer.callbacks.AdaptiveKL.target: 6.0 -> (none)']
    >>> tell_changes({"trainer.callbacks.AdaptiveKL": ("x.AdaptiveKL", ABSENT)})
    ['trainer.callbacks.AdaptiveKL: removed; what it had learnt is dropped']
    """
    lines = []
    gone: tuple[str, ...] = ()
    for name, (was, now) in changed.items():
        if gone and name.startswith(gone):
            continue
        is_callback = name.startswith("trainer.callbacks.") and name.count(".") == 2
        if is_callback and ABSENT in (was, now):
            gone = (*gone, name + ".")
            lines.append(f"{name}: " + ("added; it starts afresh" if was == ABSENT else _REMOVED))
        else:
            lines.append(f"{name}: {was} -> {now}")
    return lines


_REMOVED = "removed; what it had learnt is dropped"


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if not prefix and key in IGNORED:
            continue
        if name == "trainer.callbacks":
            found |= _flat_callbacks(name, value)
        elif isinstance(value, dict) and value:
            found |= _flat(value, name + ".")
        else:
            found[name] = value
    return found


def _flat_callbacks(prefix: str, callbacks: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []:
        name = f"{prefix}.{entry['class_path'].rpartition('.')[2]}"
        while name in found:
            name += "+"  # a second one of the class
        found[name] = entry["class_path"]
        found |= _flat(entry.get("init_args") or {}, name + ".")
    return found
