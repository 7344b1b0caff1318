"""The loop in your own hands: ``step`` makes one update of a ``Trainer.fit`` that waits between updates."""

import atexit
import functools
import itertools
import os
import sys
import threading
import warnings
from collections import UserList
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from lit_ppo.experience import Experience
from lit_ppo.parallel.ranks import n_ranks
from lit_ppo.ppo.collect import rollout_with_hooks
from lit_ppo.ppo.metrics import forget_last_update
from lit_ppo.ppo.prompts import checked_experience
from lit_ppo.shown import reason
from lit_ppo.validate import needs_package, refuse

TRAINING = {"do_sample": True, "policy": "actor", "logprobs": True, "stream": None}  # options of rollout


class OwnLoop:
    """A ``Trainer.fit`` that waits before each update for the experience to learn from.

    ``fit`` runs as a greenlet, which is a second call stack in the same thread: signals, the current GPU and all modes
    of PyTorch that belong to a thread are the same for it and for your code.

    As an iterator it yields the prompts of ``data`` until the Trainer ends the run. A ``with`` block closes it.

    Attributes:
        trainer: The Trainer.
        waiting: Whether your code runs, between two updates.
        ended: Whether the run is over: a limit of the Trainer is reached, a callback asked to stop, it was closed, or
            it has failed.
    """

    def __init__(self, module: Any, trainer: L.Trainer, data: Any, ckpt_path: str | None) -> None:
        needs_package(f"{type(module).__name__}.attach", "greenlet")
        from greenlet import getcurrent, greenlet  # type: ignore[import-untyped]  # nothing else needs it

        self.trainer, self.waiting, self.ended = trainer, False, False
        self._module, self._data, self._ckpt_path = module, data, ckpt_path
        self._prompts: Any = None  # drawn for the next update
        self._taken = False  # whether the iterator has yielded them
        self._experience: Experience | None = None  # for the update that comes; None: close
        self._end = ""  # how the run has ended
        self._thread, self._getcurrent = threading.get_ident(), getcurrent
        self._fit = greenlet(self._run)
        self._fit.gr_context = copy_context()

    def start(self) -> None:
        """Run ``fit`` up to its first update: all checks, the checkpoint to resume, the first validation."""
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
        self._resume(self._fit.switch)
        if not self.ended:
            atexit.register(self._at_exit)

    def step(self, experience: Experience) -> dict[str, float]:
        """See :func:`step`."""
        problem = None
        if self.ended:
            problem = f"training has ended {self._end}; attach a Trainer to start another run"
        elif not self.waiting:
            problem = "an update is running; call it in your own loop"
        elif self._thread != threading.get_ident():
            problem = "another thread has called attach; call both in the same one"
        elif self._data is not None and not self._taken:
            problem = "attach(data=...) draws the prompts; iterate over what it returns, and call step once for each"
        if problem is not None:
            raise RuntimeError(f"{type(self._module).__name__}.step: {problem}")
        ready = checked_experience(self._module, experience)
        self._taken = False
        self.trainer.logged_metrics.clear()
        self._resume(self._fit.switch, ready)
        return {name: float(value) for name, value in self.trainer.logged_metrics.items()}

    def close(self) -> None:
        """End the run as ``fit`` ends: the last checkpoint, ``on_train_end``, the export."""
        if not self.ended:
            fit_loop = self.trainer.fit_loop
            fit_loop.min_epochs = fit_loop.epoch_loop.min_steps = None  # Lightning would go on
            self._resume(self._fit.switch, None)

    def fail(self, error: BaseException) -> None:
        """End the run as an error in ``fit`` does; does not raise it."""
        if not self.ended:
            with suppress(BaseException):
                self._resume(self._fit.throw, error)

    def end_here(self) -> NoReturn:
        """Refuse another use of the module between two updates, for which Lightning has taken its Trainer from it."""
        error = RuntimeError(f"{type(self._module).__name__}: its own loop ends here, before another use; close() it")
        self.fail(error)
        raise error

    def __bool__(self) -> bool:
        return not self.ended

    def __enter__(self) -> "OwnLoop":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.close() if error is None else self.fail(error)

    def __iter__(self) -> Iterator[Any]:
        if self._data is None:
            raise ValueError("attach(data=None): there are no prompts to iterate over; give a data module or a loader")
        while not self.ended:
            self._taken = True
            yield self._prompts
            if self._taken:
                raise RuntimeError("attach(data=...): the last prompts had no update; call step once for each batch")

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the module has no loop

    def rollout(self, rollout: Callable[..., Experience], prompts: Any, **options: Any) -> Experience:
        """``LitPPO.rollout`` between two updates; with the options that training uses, it calls the hooks."""
        trains = all(options[name] == value for name, value in TRAINING.items())
        sample = functools.partial(rollout, self._module, **options)
        with self._as_in_a_step():
            experience: Experience = rollout_with_hooks(self._module, prompts, sample) if trains else sample(prompts)
        if trains:
            experience.origin.loop = self
        return experience

    def score(self, score: Callable[..., Tensor], experience: Experience) -> Tensor:
        """``LitPPO.score`` between two updates."""
        with self._as_in_a_step():
            return score(self._module, experience)

    @contextmanager
    def _as_in_a_step(self) -> Iterator[None]:
        """With gradients and in the Trainer's precision, in whatever mode your code is; hooks may log."""
        self.waiting, self._module._current_fx_name = False, "training_step"
        try:
            with _plain_mode(self._module), self.trainer.precision_plugin.forward_context():
                yield
        finally:
            self.waiting, self._module._current_fx_name = True, None

    def wait(self, prompts: Any) -> Any:
        """In ``fit``: let your code run until it calls ``step`` or ``close``.

        Returns:
            The batch of the update.

        Raises:
            StopIteration: The loop is closed. It ends Lightning's epoch.
        """
        forget_last_update(self.trainer)
        self._prompts, self.waiting = prompts, True
        self._experience = self._fit.parent.switch()
        self.waiting = False
        if self._experience is None:
            epoch = self.trainer.fit_loop.epoch_loop
            epoch.batch_progress.is_last_batch = False  # these prompts are not trained on
            epoch._batches_that_stepped -= 1  # as in any checkpoint of the last update
            for callback in self.trainer.checkpoint_callbacks:
                if hasattr(callback, "save"):  # now, before Lightning counts the epoch as finished
                    callback.save(self.trainer)
            epoch._batches_that_stepped += 1
            self.trainer.should_stop = True
            raise StopIteration
        return self._experience.prompts if self._data is None else prompts

    def take(self) -> Experience:
        """In ``fit``: what ``step`` was given for this update."""
        experience, self._experience = self._experience, None
        if experience is None:
            raise RuntimeError(
                "LitPPO.collect: in a loop of your own call rollout, set experience.scores, and call step; neither the "
                "module nor the data module may override on_before_batch_transfer, where updates wait"
            )
        return experience

    def _run(self) -> None:
        try:
            data = itertools.repeat(()) if self._data is None else self._data
            data = UserList(data) if isinstance(data, list | tuple) else data  # Lightning takes a list for many loaders
            self.trainer.fit(self._module, data, ckpt_path=self._ckpt_path)
            limits = f"max_steps={self.trainer.max_steps}, max_epochs={self.trainer.max_epochs}"
            self._end = f"after {self.trainer.global_step} updates ({limits}, a callback's stop, or close)"
        except BaseException as error:
            interrupted = isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
            self._end = "with an interrupt" if interrupted else f"with {reason(error)}"
            if interrupted:
                raise KeyboardInterrupt from None  # Lightning has made an exit of it
            raise
        finally:
            self.waiting, self.ended = False, True
            atexit.unregister(self._at_exit)

    def _resume(self, switch: Callable[..., Any], *args: Any) -> None:
        """Run ``fit`` until it waits again, or ends."""
        self._fit.parent = self._getcurrent()  # where an error of fit arrives
        with _plain_mode(self._module):
            switch(*args)

    def _at_exit(self) -> None:
        """Close a forgotten loop; if an error has ended the program, the run fails with it."""
        error = getattr(sys, "last_value", None)
        self.close() if error is None else self.fail(error)


def attach(module: Any, trainer: L.Trainer | None = None, data: Any = None, *, ckpt_path: str | None = None) -> OwnLoop:
    """Start the run of a loop of your own: build models and optimizers, with every check that ``fit`` makes.

    Call it before the first rollout. Without it, ``step`` attaches a Trainer on one device without callbacks, and the
    rollout before runs where ``ppo.to(device)`` says. ::

        with ppo.attach(L.Trainer(max_steps=100, callbacks=[AdaptiveKL()]), data) as batches:
            for prompts in batches:
                experience = ppo.rollout(prompts)
                experience.scores = my_scores(experience.prompts, experience.responses)
                metrics = ppo.step(experience)

    Args:
        module: The LitPPO.
        trainer: With its strategy, precision, callbacks, loggers and limits.
        data: Data module, loader or list of batches from which the Trainer draws prompts; None: you bring them.
        ckpt_path: Checkpoint to resume.

    Returns:
        The run. The end of its ``with`` block, or ``close()``, ends it as ``fit`` ends.
    """
    if module.loop:
        raise RuntimeError(f"{type(module).__name__}.attach: a loop is running already; close() it first")
    trainer = default_trainer() if trainer is None else trainer
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        problem = "would run fit in other processes than your loop; use 'ddp', or start the script with torchrun"
        refuse("Trainer", "strategy", type(trainer.strategy).__name__, problem)
    loop: OwnLoop
    module.loop = loop = OwnLoop(module, trainer, data, ckpt_path)
    loop.start()
    return loop


def step(module: Any, experience: Experience) -> dict[str, float]:
    """One update in a loop of your own, with all hooks from ``on_scores`` on; ``experience`` does not change.

    Args:
        module: The LitPPO.
        experience: From ``rollout``, with ``scores``: one number per response. ``raw_scores``, which metrics show, are
            the same unless you set them.

    Returns:
        What the Trainer logs.

    Raises:
        ValueError: The module cannot learn from this experience.
        RuntimeError: The run has ended: ``ppo.loop.ended``.
    """
    loop: OwnLoop = attach(module) if module.loop is None else module.loop
    return loop.step(experience)


def default_trainer() -> L.Trainer:
    """A quiet Trainer on one device."""
    if n_ranks() > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problem = "there are several processes; call attach(L.Trainer(devices=..., strategy='ddp')) first"
        raise RuntimeError(f"LitPPO.step: {problem}")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(devices=1, max_epochs=-1, **quiet)  # type: ignore[arg-type]


def on_before_batch_transfer(module: Any, batch: Any, dataloader_idx: int) -> Any:
    """Lightning's first hook with a batch: updates of a loop of your own wait here."""
    return module.loop.wait(batch) if module.loop and module.trainer.training else batch


@contextmanager
def _plain_mode(module: Any) -> Iterator[None]:
    """Gradients, no inference mode, no autocast: as a program starts."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(module.device.type, enabled=False):
        yield
