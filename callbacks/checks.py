"""Checks of the module, the trainer and other callbacks; messages name what is missing and what to do."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from lit_ppo.validate import refuse

# What a module of one's own computes for them, each a mean over the response tokens of the optimizer step.
METRICS = {
    "approx_kl": 'the mean of lit_ppo.functional.kl_estimate(logprobs, new_logprobs, "k3")',
    "entropy": "the mean of new_entropy",
    "value_loss": "the critic's loss",
}


def require(callback: L.Callback, pl_module: Any, *names: str) -> None:
    """Check that the module has the attributes that the callback needs.

    Raises:
        TypeError: One is missing.
        ValueError: It is ``score``, and the module has no rewards.
    """
    missing = [name for name in names if not hasattr(pl_module, name)]
    if missing:
        raise TypeError(
            f"{type(callback).__name__} needs {', '.join(missing)} on the module, "
            f"which {type(pl_module).__name__} lacks; add it, or remove the callback"
        )
    if "score" in names and getattr(pl_module, "rewards", True) is None:
        raise ValueError(
            f"{type(callback).__name__} scores responses of its own, for which there is nothing in "
            f"{type(pl_module).__name__}(rewards=None); give it rewards, or remove the callback"
        )


def require_data_module(callback: L.Callback, data: Any) -> L.LightningDataModule:
    """Check the argument ``data`` of a callback.

    Raises:
        ValueError: It is not a LightningDataModule.
    """
    if not isinstance(data, L.LightningDataModule):
        refuse(callback, "data", data, "must be a LightningDataModule, such as a TextDataModule")
    return data


def require_model(callback: L.Callback, pl_module: Any, name: str) -> None:
    """Check, once models are built, that the module has one of them.

    Args:
        callback: The callback that needs it.
        pl_module: The module.
        name: ``critic`` or ``reference``.

    Raises:
        TypeError: The module has no such attribute.
        ValueError: The attribute is None.
    """
    require(callback, pl_module, name)
    if getattr(pl_module, name) is None:
        raise ValueError(
            f"{type(callback).__name__} needs a {name}, but {type(pl_module).__name__}({name}=None) has none; "
            f"give it a {name}, or remove the callback"
        )


def refuse_none(callback: L.Callback, pl_module: Any, name: str) -> None:
    """Refuse a module that says that it has no such model. One that has it under another name is accepted.

    Args:
        callback: The callback, which reads what the model computes, but not the attribute.
        pl_module: The module.
        name: ``critic`` or ``reference``.

    Raises:
        ValueError: The attribute is None.
    """
    if hasattr(pl_module, name):
        require_model(callback, pl_module, name)


def metric(callback: L.Callback, pl_module: Any, metrics: dict[str, float], name: str) -> float | None:
    """A metric of the optimizer step; None for one of the actor's while the actor is frozen.

    Raises:
        TypeError: The module does not compute it.
    """
    fired = getattr(pl_module, "_fired", None)
    frozen = getattr(pl_module, "actor_frozen", False) if fired is None else fired.frozen
    if name not in metrics and (name == "value_loss" or not frozen):
        module = type(pl_module).__name__
        raise TypeError(
            f"{type(callback).__name__} reads metrics[{name!r}] in on_minibatch_end, which {module} lacks; in {module} "
            f"add it to the metrics ({METRICS[name]}), or remove the callback"
        )
    return metrics.get(name)


def reward_names(pl_module: Any) -> list[str] | None:
    """Names of the module's rewards, none if there is only one; None if the module has no ``rewards``."""
    return list(getattr(pl_module.rewards, "sources", [])) if hasattr(pl_module, "rewards") else None


def require_token_rewards(callback: L.Callback, pl_module: Any) -> None:
    """Check that the module's advantage estimator, if it has one, reads the token rewards that the callback writes.

    Raises:
        ValueError: It does not.
    """
    estimator = getattr(pl_module, "advantages", None)
    if not getattr(estimator, "needs_rewards", True):
        raise ValueError(
            f"{type(callback).__name__} changes token rewards, which "
            f"{type(pl_module).__name__}(advantages={type(estimator).__name__}) does not read: it uses the "
            "scores; remove the callback, put the KL into the loss with KLLoss, or use another estimator"
        )


def require_weighted_rows(callback: L.Callback, trainer: L.Trainer, pl_module: Any, *names: str) -> Any:
    """The data module, after its setup, if it can draw rows by weight.

    Args:
        callback: The callback.
        trainer: The trainer.
        pl_module: The module, for the message.
        *names: What the callback needs besides ``set_weights``.

    Raises:
        TypeError: It cannot, or there is none.
    """
    data = getattr(trainer, "datamodule", None)
    missing = [name for name in (*names, "set_weights") if not hasattr(data, name)]
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
    """Check that the data module has ``peek``, which returns some of its prompts.

    Raises:
        TypeError: It does not, or there is none.
    """
    data = getattr(trainer, "datamodule", None)
    if not hasattr(data, "peek"):
        lacks = "without a data module" if data is None else f"on {type(data).__name__}, which lacks peek"
        raise TypeError(
            f"{type(callback).__name__} reads held-out prompts, but {type(pl_module).__name__} is trained {lacks}; "
            "train it on a PromptDataModule, or remove the callback"
        )


def warn_of_gaps(callback: L.Callback, trainer: L.Trainer) -> None:
    """Warn if loggers do not get the numbers of every update, since measured ones could get lost."""
    if trainer.loggers and trainer.log_every_n_steps != 1:  # type: ignore[attr-defined]
        rank_zero_warn(
            f"{type(callback).__name__}: Trainer(log_every_n_steps={trainer.log_every_n_steps}) can skip the "  # type: ignore[attr-defined]
            "updates that are measured; use log_every_n_steps=1"
        )


def loader_over_rows(callback: L.Callback, data: L.LightningDataModule, name: str) -> DataLoader[Any]:
    """The loader of a data module, if the callback can choose the order of its rows.

    Args:
        callback: The callback.
        data: The data module.
        name: The method that returns the loader.

    Raises:
        ValueError: It is not a ``DataLoader`` over a data set with a length.
    """
    loader = getattr(data, name)()
    batched = isinstance(loader, DataLoader) and (loader.batch_size is not None or loader.batch_sampler is None)
    if not batched or isinstance(loader.dataset, IterableDataset) or not len(loader.dataset):
        raise ValueError(
            f"{type(callback).__name__}(data={type(data).__name__}): {name}() must return a DataLoader over a "
            "map-style dataset; use a data set with a length above 0, and no batch_sampler"
        )
    return loader  # type: ignore[no-any-return]


def refuse_beside(callback: L.Callback, trainer: L.Trainer, *others: type[L.Callback], why: str) -> None:
    """Refuse other callbacks that cannot be combined with this one; a class can refuse a second instance of itself.

    Raises:
        ValueError: There is one.
    """
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is not callback and isinstance(other, others):
            raise ValueError(f"{type(callback).__name__} and {type(other).__name__}: {why}; keep one of them")


def refuse_behind(callback: L.Callback, trainer: L.Trainer, *others: type[L.Callback], why: str) -> None:
    """Refuse a position after another callback in the list.

    Raises:
        ValueError: The callback comes later.
    """
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is callback:
            return
        if isinstance(other, others):
            name, earlier = type(callback).__name__, type(other).__name__
            raise ValueError(f"{name} comes after {earlier} in the list of callbacks: {why}; put {name} first")


def refuse_same_loss(callback: L.Callback, trainer: L.Trainer, *others: type[L.Callback]) -> None:
    """Refuse a second callback that replaces the same loss term.

    Raises:
        ValueError: There is one.
    """
    refuse_beside(callback, trainer, *others, why="both replace the same loss term")
