"""Call the hooks, and refuse what would leave a callback without effect, unnoticed."""

from collections import deque
from dataclasses import FrozenInstanceError, dataclass, field
from difflib import get_close_matches
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_ppo.callbacks.fields import FIELDS, check_fields, first_malformed, missing_field

HOOKS: dict[str, str] = {
    "on_rollout_start": "prompts",
    "on_rollout_end": "experience",
    "on_scores": "experience",
    "on_rewards": "experience",
    "on_advantages": "experience",
    "on_minibatch_start": "minibatch",
    "on_actor_loss": "minibatch, losses",
    "on_critic_loss": "minibatch, losses",
    "on_minibatch_end": "experience, metrics",
    "on_update_end": "experience",
}
# Where a module calls fire, for the error of a hook that never came.
PLACES = {
    "on_rollout_start": "before it samples",
    "on_rollout_end": "after it has sampled",
    "on_scores": "where raw_scores and scores are set",
    "on_rewards": "where rewards are set",
    "on_advantages": "where advantages and returns are set",
    "on_minibatch_start": "after zero_grad, before each optimizer step's forward",
    "on_actor_loss": 'between losses = {"policy": loss} and the backward of sum(losses.values())',
    "on_critic_loss": 'between losses = {"value": loss} and the backward of sum(losses.values())',
    "on_minibatch_end": "after the last backward of an optimizer step, before the step",
    "on_update_end": "after the last optimizer step of an update",
}
OF_STEPS = ("on_minibatch_start", "on_actor_loss", "on_critic_loss", "on_minibatch_end")


@dataclass
class Fired:
    """What a module has fired so far; kept in its attribute ``_fired``."""

    ever: set[str] = field(default_factory=set)
    now: set[str] = field(default_factory=set)  # in this update
    step: int = 0  # optimizer steps before this update
    frozen: bool = False  # whether the actor was frozen at some time in this update
    starts_frozen: bool = False  # whether it was at its start
    exhausted_by: str | None = None  # the callback that has ended this update

    def start_update(self) -> None:
        """Forget the last update."""
        self.now, self.frozen, self.exhausted_by = set(), False, None


def fire(pl_module: L.LightningModule, hook: str, *args: Any) -> None:
    """Call ``hook(trainer, pl_module, *args)`` on every callback of the trainer that has it, in list order.

    Args:
        pl_module: The module that is training; it needs a trainer.
        hook: One of ``HOOKS``.
        *args: What the hook hands over.

    Raises:
        TypeError: A callback cannot work on this module: it waits for a hook that an update did not fire, reads a field
            that is missing or has another shape, or has ended an update that goes on.
        ValueError: Two callbacks replace the same loss term.
    """
    trainer: Any = pl_module.trainer
    fired = _before(trainer, pl_module, hook, args)
    setters: dict[str, str] = {}  # of each loss term, the callback that has set it
    for callback in trainer.callbacks:
        function = getattr(callback, hook, None)
        if function is not None:
            name = type(callback).__name__
            losses = dict(args[1]) if hook in ("on_actor_loss", "on_critic_loss") else None
            with trainer.profiler.profile(f"[Callback]{name}.{hook}"):
                _call(callback, hook, function, (trainer, pl_module, *args))
            if losses is not None:
                _check_losses(f"{name}.{hook}", losses, args[1], setters)
            if args and hook != "on_update_end" and getattr(args[0], "exhausted", False) is True:
                fired.exhausted_by = fired.exhausted_by or name
    if hook == "on_update_end":
        check_hooks(trainer, pl_module, exhausted=getattr(args[0], "exhausted", False) if args else False)
        fired.start_update()


def _before(trainer: Any, pl_module: Any, hook: str, args: tuple[Any, ...]) -> Fired:
    """Note a hook that is about to be fired."""
    if not hasattr(pl_module, "_fired"):
        warn_of_misspelt(trainer.callbacks)
    fired: Fired = getattr(pl_module, "_fired", None) or Fired()
    pl_module._fired = fired
    step = getattr(trainer, "global_step", 0)
    if hook in fired.now and hook not in OF_STEPS and "on_update_end" not in fired.ever and step > fired.step:
        check_hooks(trainer, pl_module)  # a second update starts, and the first one had no end
        fired.start_update()
    frozen = getattr(pl_module, "actor_frozen", False)
    if not fired.now:
        fired.step, fired.starts_frozen = step, frozen
    if hook == "on_actor_loss" and fired.starts_frozen and frozen:
        module = type(pl_module).__name__
        raise TypeError(
            f"a callback has set actor_frozen, but {module} trains its actor; in {module} add if not actor_frozen: "
            "before the actor's forward and step, or remove the callback"
        )
    if hook == "on_critic_loss" and getattr(pl_module, "critic_frozen", False):
        module = type(pl_module).__name__
        raise TypeError(
            f"a callback has set critic_frozen, but {module} trains its critic; in {module} add if not critic_frozen: "
            "before the critic's forward and step, or remove the callback"
        )
    if hook in OF_STEPS:
        refuse_ignored_end(pl_module)
    elif hook == "on_update_end" or not getattr(args[0] if args else None, "exhausted", False):
        fired.exhausted_by = None
    fired.ever.add(hook)
    fired.now.add(hook)
    fired.frozen = fired.frozen or frozen
    return fired


def _call(callback: Any, hook: str, function: Any, args: tuple[Any, ...]) -> None:
    """Call a hook; an error that comes from a field of the experience or minibatch names it."""
    where, rows = f"{type(callback).__name__}.{hook}", args[2] if len(args) > 2 else None
    argument = HOOKS.get(hook, "experience").split(", ")[0]
    if getattr(function, "__module__", None) != "lit_ppo.callbacks.base":  # which does nothing with them
        check_fields(where, argument, rows, getattr(type(callback), "reads", ()))
    before = {field: getattr(rows, field, None) for field in FIELDS}
    try:
        function(*args)
    except AttributeError as error:
        if rows is not None and error.obj is rows:
            raise missing_field(where, argument, rows, error, hook) from error
        if isinstance(error, FrozenInstanceError) or "can't set attribute" in str(error):
            raise TypeError(
                f"{where} sets fields of the {argument}, but {type(rows).__name__} does not allow it ({error}); use a "
                "class whose fields can be set, such as lit_ppo.callbacks.Experience"
            ) from error
        raise
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        problem = first_malformed(where, argument, rows)
        if problem is None:
            raise
        raise TypeError(problem) from error
    written = [field for field in FIELDS if getattr(rows, field, None) is not before[field]]
    check_fields(where, argument, rows, written, verb="writes")
    _check_rows(where, before["response_mask"], getattr(rows, "response_mask", None))


def warn_of_misspelt(callbacks: list[Any]) -> None:
    """Warn of methods of plain Lightning callbacks whose names are nearly those of hooks; nothing calls them."""
    for callback in callbacks:
        own = [name for name in dir(type(callback)) if name.startswith("on_") and not hasattr(L.Callback, name)]
        for name in own:
            meant = get_close_matches(name, HOOKS, n=1, cutoff=0.8)
            if meant and name not in HOOKS:
                rank_zero_warn(f"{type(callback).__name__}.{name}: nothing calls it; did you mean {meant[0]}?")


def waited_for(callback: Any, pl_module: Any) -> set[str]:
    """The hooks without which a callback does not work."""
    if hasattr(callback, "waits_for"):
        hooks: set[str] = callback.waits_for(pl_module)
        return hooks
    return {hook for hook in HOOKS if hasattr(callback, hook)}


def check_hooks(trainer: Any, pl_module: Any, *, exhausted: bool = False) -> None:
    """Check, after an update, that every callback got the hooks that it waits for.

    Args:
        trainer: The trainer.
        pl_module: The module.
        exhausted: Whether a callback has ended the update.

    Raises:
        TypeError: Names a callback, its hooks and the lines to add.
    """
    fired: Fired = pl_module._fired
    excused = {"on_actor_loss"} if fired.frozen else set()
    if getattr(pl_module, "critic", pl_module) is None or getattr(pl_module, "critic_frozen", False):
        excused.add("on_critic_loss")
    if exhausted and not fired.now.intersection(OF_STEPS):
        excused.update(OF_STEPS)
    for callback in trainer.callbacks:
        never = waited_for(callback, pl_module) - fired.ever - excused
        if never:
            name, module = type(callback).__name__, type(pl_module).__name__
            hooks = [hook for hook in HOOKS if hook in never]
            lines = [f'fire(self, "{hook}", {HOOKS[hook]}) {PLACES[hook]}' for hook in hooks]
            raise TypeError(
                f"{name} waits for {' and '.join(hooks)}, which {module} never fires, so it would have no effect; in "
                f"{module} add {'; '.join(lines)}; or remove the callback"
            )


def refuse_ignored_end(pl_module: Any) -> None:
    """Refuse a module that goes on with an update that a callback has ended.

    Raises:
        TypeError: Names the callback.
    """
    callback = getattr(getattr(pl_module, "_fired", None), "exhausted_by", None)
    if callback is not None:
        module = type(pl_module).__name__
        raise TypeError(
            f"{callback} has set experience.exhausted = True to end the update, but {module} goes on; in {module} add "
            "if experience.exhausted: break before each optimizer step, or remove the callback"
        )


def _check_rows(where: str, before: Any, after: Any) -> None:
    """Refuse a callback that has removed all rows."""
    if isinstance(before, Tensor) and isinstance(after, Tensor) and len(before) and not len(after):
        raise ValueError(f"{where} keeps no response; set experience.exhausted = True to end the update instead")


def _check_losses(where: str, before: dict[str, Tensor], losses: dict[str, Tensor], setters: dict[str, str]) -> None:
    """Refuse a callback that replaces a loss term that another one has set; it may compute its own from that one."""
    name = where.partition(".")[0]
    for key, loss in losses.items():
        if key in before and loss is before[key]:
            continue
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(f"{where} sets losses[{key!r}] to {found}; set a scalar tensor, such as minibatch.mean(x)")
        if key in before and key in setters and not _uses(loss, before[key]):
            raise ValueError(
                f"{setters[key]} and {name}: both replace the same loss term, losses[{key!r}], and only the second "
                "would have an effect; put one that only changes the value last, or keep one of them"
            )
        setters[key] = name


def _uses(loss: Any, part: Any) -> bool:
    """Whether a loss is computed from another one, or that one has no graph by which to tell."""
    sought = getattr(part, "grad_fn", None)
    if sought is None:
        return True
    found, queue = set(), deque([getattr(loss, "grad_fn", None)])
    while queue:
        node = queue.popleft()
        if node is sought:
            return True
        if node is not None and node not in found:
            found.add(node)
            queue.extend(following for following, _ in node.next_functions)
    return False
