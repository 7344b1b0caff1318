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

    >>> changes({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None})
    {'a.c': (2, 3), 'd': ('(none)', None)}
    """
    before, after = _flat(old), _flat(new)
    pairs = {name: (before.get(name, ABSENT), after.get(name, ABSENT)) for name in before | after}
    return {name: (was, now) for name, (was, now) in pairs.items() if type(was) is not type(now) or was != now}


def check_changes(path: str, changed: Changes) -> None:
    """Refuse a change that cannot take effect in a resumed run.

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


def describe_changes(changed: Changes) -> list[str]:
    """One line for each change, old -> new. An added or removed callback is one change.

    >>> describe_changes({"kl_coef": (0.05, 0.1), "trainer.callbacks.AdaptiveKL.target": (6.0, ABSENT)})
    ['kl_coef: 0.05 -> 0.1', 'trainer.callbacks.AdaptiveKL.target: 6.0 -> (none)']
    >>> describe_changes({"trainer.callbacks.AdaptiveKL": ("x.AdaptiveKL", ABSENT)})
    ['trainer.callbacks.AdaptiveKL: removed; its state is dropped']
    """
    lines = []
    described: tuple[str, ...] = ()  # prefixes of callbacks that were added or removed
    for name, (was, now) in changed.items():
        if name.startswith(described):
            continue
        is_callback = name.startswith("trainer.callbacks.") and name.count(".") == 2
        if is_callback and ABSENT in (was, now):
            described = (*described, name + ".")
            lines.append(f"{name}: " + ("added; it starts anew" if was == ABSENT else "removed; its state is dropped"))
        else:
            lines.append(f"{name}: {was} -> {now}")
    return lines


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in IGNORED:
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
            name += "+"  # another one of that class
        found[name] = entry["class_path"]
        found |= _flat(entry.get("init_args") or {}, name + ".")
    return found
