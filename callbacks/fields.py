"""The fields that callbacks read of an experience or a minibatch, and errors for modules that lack one."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Field(NamedTuple):
    """A tensor with one entry per row (``"B"``), or per row and response token (``"B, T"``)."""

    shape: str
    kind: str  # float, int or bool
    meaning: str


FIELDS = {
    "prompt_index": Field("B", "int", "each prompt's row in the data set"),
    "group": Field("B", "int", "the same number for all responses to one prompt"),
    "response_ids": Field("B, T", "int", "tokens of the responses"),
    "response_mask": Field("B, T", "bool", "True at response tokens"),
    "ended": Field("B", "bool", "True where a stop token ended the response"),
    "logprobs": Field("B, T", "float", "log-probs of the policy that sampled"),
    "sampling_logprobs": Field("B, T", "float", "log-probs of the engine that sampled; None if the policy did"),
    "ref_logprobs": Field("B, T", "float", "log-probs of the reference"),
    "values": Field("B, T", "float", "the critic's values at the rollout"),
    "kl": Field("B, T", "float", "the KL to the reference that is penalised, 0 where masked"),
    "raw_scores": Field("B", "float", "scores as the reward gave them"),
    "scores": Field("B", "float", "scores as callbacks have changed them"),
    "rewards": Field("B, T", "float", "token rewards, 0 where masked"),
    "advantages": Field("B, T", "float", "advantages, 0 where masked"),
    "returns": Field("B, T", "float", "what the critic learns, 0 where masked"),
    "new_logprobs": Field("B, T", "float", "log-probs of the policy that learns, with a graph"),
    "new_entropy": Field("B, T", "float", "entropy of the policy that learns, with a graph"),
    "new_values": Field("B, T", "float", "the critic's new values, with a graph"),
}
OTHERS = {
    "mean": "mean(x): the mean of x (B, T) over the response tokens of the optimizer step",
    "log": "log(name, x): add the mean of x (B, T) to the step's metrics",
    "keep": "keep(rows): cut all fields to some rows, in place",
    "exhausted": "False; True ends the update",
    "extras": "a dict",
}


def described(name: str) -> str:
    """What a field is, with its shape."""
    if name in FIELDS:
        field = FIELDS[name]
        return f"({field.shape}) {field.kind}, {field.meaning}"
    return OTHERS.get(name, "which it needs")


def missing_field(where: str, argument: str, rows: Any, error: AttributeError, hook: str) -> TypeError:
    """The error of a field that an experience or minibatch lacks.

    Args:
        where: Callback and hook.
        argument: ``experience`` or ``minibatch``.
        rows: What the hook was given.
        error: The error; its ``name`` is the field.
        hook: The hook.
    """
    owner, name = type(rows).__name__, str(error.name)
    reason = f" ({error})" if str(error).startswith(f"{owner}.") else ""
    ways = [] if name in ("mean", "log", "keep") else [f'set it before fire(self, "{hook}", ...)']
    ways += [] if type(rows).__module__.startswith("lit_ppo.") else ["use lit_ppo.callbacks.Experience"]
    return TypeError(
        f"{where} needs {argument}.{name}: {described(name)}; {owner} lacks it{reason}; {', '.join(ways)}, or remove "
        "the callback"
    )


def check_fields(where: str, argument: str, rows: Any, names: Iterable[str], *, verb: str = "reads") -> None:
    """Check shape and kind of the fields that are there.

    Args:
        where: Callback and hook.
        argument: ``experience`` or ``minibatch``.
        rows: What the hook was given.
        names: Of the fields.
        verb: What the callback does with them, ``reads`` or ``writes``.

    Raises:
        TypeError: Names the callback, the hook, the field, its shape and what was given.
    """
    for name in names:
        found = _malformed(rows, name) if name in FIELDS else None
        if found is not None:
            raise TypeError(f"{where} {verb} {argument}.{name}: {described(name)}; {type(rows).__name__} has {found}")


def first_malformed(where: str, argument: str, rows: Any) -> str | None:
    """What is wrong with the first field that has another shape or kind, if there is one."""
    try:
        check_fields(where, argument, rows, FIELDS)
    except TypeError as error:
        return str(error)
    return None


def present(rows: Any, name: str) -> Tensor:
    """A field that is None where the module has no critic or no reference.

    Raises:
        AttributeError: It is None; :func:`~lit_ppo.callbacks.hooks.fire` explains it.
    """
    value: Tensor | None = getattr(rows, name)
    if value is None:
        raise AttributeError(f"{type(rows).__name__}.{name} is None", name=name, obj=rows)
    return value


def extra(callback: object, experience: Any, name: str) -> Any:
    """What a training rollout leaves in ``extras`` where a callback has asked for it.

    Args:
        callback: The one that has asked.
        experience: All rows.
        name: Of the entry.

    Raises:
        TypeError: It is not there.
    """
    if name not in experience.extras:
        raise TypeError(
            f"{type(callback).__name__} needs experience.extras[{name!r}], which training rollouts (stream=None) of "
            "LitPPO leave there; roll out after training has started, or remove the callback"
        )
    return experience.extras[name]


def _malformed(rows: Any, name: str) -> str | None:
    """What a field is instead of what it should be; None if it is right, missing or None."""
    value, mask = getattr(rows, name, None), getattr(rows, "response_mask", None)
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}; make it a tensor"
    field = FIELDS[name]
    n_dims = len(field.shape.split(","))
    shape = mask.shape[:n_dims] if isinstance(mask, Tensor) and mask.ndim == 2 else value.shape
    kind = "bool" if value.dtype == torch.bool else "float" if value.is_floating_point() else "int"
    if value.ndim == n_dims and value.shape == shape and kind == field.kind:
        return None
    expected = f", beside a response_mask {tuple(mask.shape)}" if value.shape != shape else ""  # type: ignore[union-attr]
    advice = "; convert it with .bool()" if field.kind == "bool" and kind != "bool" else ""
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{expected}{advice}"
