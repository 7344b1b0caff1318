"""What tricks check of their arguments, of the module and of each other; messages name class, argument and value."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset


def require(callback: L.Callback, pl_module: Any, *names: str) -> None:
    """Check that the module offers what the callback needs.

    Raises:
        TypeError: Naming both, and what is missing.
    """
    missing = [name for name in names if not hasattr(pl_module, name)]
    if missing:
        raise TypeError(
            f"{type(callback).__name__} needs {', '.join(missing)} on the module, "
            f"which {type(pl_module).__name__} lacks; add it, or remove the callback"
        )


def require_model(callback: L.Callback, pl_module: Any, name: str) -> None:
    """Check, once models are built, that the module has one of them.

    Args:
        callback: Who needs it.
        pl_module: The module.
        name: ``critic`` or ``reference``.

    Raises:
        TypeError: The module knows nothing of it.
        ValueError: It is None. Both name callback and module.
    """
    require(callback, pl_module, name)
    if getattr(pl_module, name) is None:
        raise ValueError(
            f"{type(callback).__name__} needs a {name}, but {type(pl_module).__name__}({name}=None) has none; "
            f"give it a {name}, or remove the callback"
        )


def require_token_rewards(callback: L.Callback, pl_module: Any) -> None:
    """Check that the module's estimator, where it has one, reads the token rewards that the callback writes.

    Raises:
        ValueError: It does not. Names both.
    """
    estimator = getattr(pl_module, "advantages", None)
    if not getattr(estimator, "needs_rewards", True):
        raise ValueError(
            f"{type(callback).__name__} changes token rewards, which "
            f"{type(pl_module).__name__}(advantages={type(estimator).__name__}) does not read: it takes the scores as "
            "they are; remove the callback, put the KL into the loss with KLLoss, or use another estimator"
        )


def require_weighted_rows(callback: L.Callback, trainer: L.Trainer, pl_module: Any) -> Any:
    """The data module, once it is set up, if it can draw rows by weight.

    Raises:
        TypeError: It cannot, or there is none. Names callback, module and data module.
    """
    data = getattr(trainer, "datamodule", None)
    missing = [name for name in ("columns", "set_weights") if not hasattr(data, name)]
    if missing:
        lacks = (
            "without a data module" if data is None else f"on {type(data).__name__}, which lacks {', '.join(missing)}"
        )
        raise TypeError(
            f"{type(callback).__name__} draws prompts by weight, but {type(pl_module).__name__} is trained {lacks}; "
            "train it on a PromptDataModule, or remove the callback"
        )
    return data


def require_prompts(callback: L.Callback, trainer: L.Trainer, pl_module: Any) -> None:
    """Check that the data module lets one look at its prompts.

    Raises:
        TypeError: It does not, or there is none. Names callback, module and data module.
    """
    data = getattr(trainer, "datamodule", None)
    if not hasattr(data, "peek"):
        lacks = "without a data module" if data is None else f"on {type(data).__name__}, which has no peek to do so"
        raise TypeError(
            f"{type(callback).__name__} looks at held-out prompts, but {type(pl_module).__name__} is trained {lacks}; "
            "train it on a PromptDataModule, or remove the callback"
        )


def warn_of_gaps(callback: L.Callback, trainer: L.Trainer) -> None:
    """Warn where the trainer's loggers do not get every update's numbers: those of what is measured get lost."""
    if trainer.loggers and trainer.log_every_n_steps != 1:  # type: ignore[attr-defined]
        rank_zero_warn(
            f"{type(callback).__name__}: Trainer(log_every_n_steps={trainer.log_every_n_steps}) logs other updates "  # type: ignore[attr-defined]
            "than those that are measured; use log_every_n_steps=1"
        )


def loader_over_rows(callback: L.Callback, data: L.LightningDataModule, name: str) -> DataLoader[Any]:
    """The data module's loader, if its rows can be drawn in an order of the callback's own.

    Args:
        callback: Who draws.
        data: The data module.
        name: The method that gives the loader.

    Raises:
        ValueError: It is no ``DataLoader`` over a data set with a length. Names both.
    """
    loader = getattr(data, name)()
    batched = isinstance(loader, DataLoader) and (loader.batch_size is not None or loader.batch_sampler is None)
    if not batched or isinstance(loader.dataset, IterableDataset) or not len(loader.dataset):
        raise ValueError(
            f"{type(callback).__name__}(data={type(data).__name__}): {name}() gives no DataLoader over rows that can "
            "be drawn in an order of ours; use a data set with a length over 0, and no batch_sampler"
        )
    return loader  # type: ignore[no-any-return]


def levels(callback: object, name: str, value: Any, above: float) -> tuple[float, float]:
    """``value`` if it is two finite numbers over ``above``, the first not over the second.

    Raises:
        ValueError: Naming class, argument and value.
    """
    given = value if isinstance(value, list | tuple) else ()
    numbers = [x for x in given if isinstance(x, int | float) and not isinstance(x, bool)]
    if len(numbers) != 2 or len(given) != 2 or not above < numbers[0] <= numbers[1] < float("inf"):
        raise ValueError(
            f"{type(callback).__name__}({name}={value!r}): must be two numbers over {above:g}, the level of a warning "
            "and that of an alarm, the first not over the second; None switches the rule off"
        )
    return numbers[0], numbers[1]


def refuse_beside(callback: L.Callback, trainer: L.Trainer, *others: type[L.Callback], why: str) -> None:
    """Refuse another callback that cannot work beside this one; the class itself may be among ``others``.

    Raises:
        ValueError: Naming both, and why.
    """
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is not callback and isinstance(other, others):
            raise ValueError(f"{type(callback).__name__} and {type(other).__name__}: {why}; keep one of them")


def refuse_behind(callback: L.Callback, trainer: L.Trainer, *others: type[L.Callback], why: str) -> None:
    """Refuse to stand behind another callback in the list.

    Raises:
        ValueError: Naming both, and why.
    """
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is callback:
            return
        if isinstance(other, others):
            name, ahead = type(callback).__name__, type(other).__name__
            raise ValueError(f"{name} stands behind {ahead}: {why}; put {name} ahead of {ahead}")


def refuse_same_loss(callback: L.Callback, trainer: L.Trainer, *others: type[L.Callback]) -> None:
    """Refuse a second callback that replaces the same loss term.

    Raises:
        ValueError: Naming both.
    """
    refuse_beside(callback, trainer, *others, why="both replace the same loss term")
