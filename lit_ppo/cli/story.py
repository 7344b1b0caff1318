"""Where a run stands, in words: updates, metrics, the phase at work, the time left."""

import math
import time
from collections.abc import Callable
from typing import Any

import lightning as L

from lit_ppo.cli.heartbeat import Heartbeat
from lit_ppo.cli.pace import Pace, duration

SPEED = "throughput/tokens_per_second"
LEFT_OUT = ("objective/", "response/", "train/")  # of a metric's name


def phase_of(pl_module: Any) -> str:
    """What the module says it is doing: ``rollout``, ``score``, ``update``; empty if it says nothing."""
    return str(getattr(pl_module, "phase", "") or "")


def updates_done(trainer: L.Trainer) -> int:
    """Updates, or optimizer steps where those are Lightning's own, that the whole run has behind it."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(batches.processed)


def total_updates(trainer: L.Trainer) -> float:
    """Updates (see :func:`updates_done`) that the run will take, over all epochs; infinite where that is not known."""
    steps = trainer.num_training_batches / trainer.accumulate_grad_batches
    if steps != math.inf:
        steps = math.ceil(steps)
    epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else math.inf
    total = steps * epochs if steps else 0.0
    if trainer.max_steps < 0:
        return total
    done = updates_done(trainer)
    # a module that steps its optimizers by hand may take several global steps in an update, or none
    each = max(1.0, trainer.global_step / done) if done else 1.0
    return min(total, done + math.ceil(max(0, trainer.max_steps - trainer.global_step) / each))


def unit(trainer: L.Trainer) -> str:
    """What is counted."""
    return "step" if trainer.lightning_module.automatic_optimization else "update"


def shown(name: str, value: float) -> str:
    """A metric in few words.

    >>> shown("objective/score", 1.23456), shown("response/length", 16384.0), shown(SPEED, 1234.5), shown(SPEED, 0.42)
    ('score 1.235', 'length 16,384', '1,234 tok/s', '0.42 tok/s')
    """
    return f"{number(value)} tok/s" if name == SPEED else f"{short(name)} {number(value, digits=4)}"


def number(x: float, digits: int = 3) -> str:
    """So many digits, or all that stand before the point.

    >>> number(0.3149), number(-22.0), number(-1250.4), number(999.5), number(-0.0)
    ('0.315', '-22', '-1,250', '1,000', '0')
    """
    return f"{x:,.0f}" if abs(x) >= 10**digits - 0.5 else f"{x + 0.0:,.{digits}g}"


def short(name: str) -> str:
    """A metric's name in few letters."""
    for prefix in LEFT_OUT:
        name = name.removeprefix(prefix)
    return "tok/s" if name == SPEED else name


def fitting(words: list[str], columns: int) -> str:
    """Words in one line, the last metrics left out where they do not fit.

    >>> fitting(["update 1/2", "score 1", "kl 2", "(rollout)", "9 s left"], 45)
    'update 1/2  score 1  (rollout)  9 s left'
    """
    line = "  ".join(words)
    while len(line) > columns and len(words) > 1:
        metrics = [i for i, word in enumerate(words) if i and not word.startswith("(") and not word.endswith(" left")]
        words = [word for i, word in enumerate(words) if i != (metrics[-1] if metrics else len(words) - 1)]
        line = "  ".join(words)
    return line[:columns]


class Story(L.Callback):
    """Knows where a run stands, and says so; what is done with the words is up to subclasses.

    Metrics are taken in Lightning's hooks: another thread that shows them must not make Lightning compute any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock: Callable[[], float] = time.monotonic
        self.pace = Pace()
        self.on_line: Callable[[], None] = _nothing  # told of everything printed
        self.watched = False  # whether somebody else sees to signs of life
        self._run: Any = None  # the trainer
        self._metrics: dict[str, float] = {}
        self._set_up = 0.0
        self._ended = False
        self._pulse: Heartbeat | None = None

    def show(self, *, force: bool = False) -> None:
        """Something has happened.

        Args:
            force: It is worth telling.
        """

    def redraw(self) -> bool:
        """Time has passed: show it; False if there is nothing to draw on."""
        return False

    def line(self) -> str:
        """All words."""
        return "  ".join(self.words())

    def words(self) -> list[str]:
        """Where the run stands, metrics, phase, time left."""
        trainer = self._run
        if trainer is None or trainer.lightning_module is None or trainer.state.fn is None:
            return ["preparing"]
        fn = trainer.state.fn.value
        if self._ended:
            return [f"finishing {fn}"]
        if trainer.sanity_checking:
            return ["checking that validation works"]
        where = [word for word in (self._training(), self._evaluating()) if word]
        if not where:
            waited = self.clock() - self._set_up
            return [f"preparing to {fn}", *([f"({duration(waited)})"] if waited >= 1.0 else [])]
        metrics = [shown(name, value) for name, value in self._metrics.items()]
        phase, left = self.phase(), self.left()
        ends = [f"({phase})" if phase else "", f"{left} left" if left else ""]
        return [", ".join(where), *metrics, *(word for word in ends if word)]

    def _training(self) -> str:
        trainer = self._run
        if trainer.state.fn != "fit" or trainer.train_dataloader is None:
            return ""
        return unit(trainer) + _of(updates_done(trainer), total_updates(trainer))

    def _evaluating(self) -> str:
        trainer = self._run
        if not (trainer.evaluating or trainer.predicting):
            return ""
        fit = trainer.fit_loop.epoch_loop.val_loop
        loops = {"fit": fit, "validate": trainer.validate_loop, "test": trainer.test_loop}
        loop: Any = loops.get(trainer.state.fn.value, trainer.predict_loop)
        batches = loop.max_batches if isinstance(loop.max_batches, list) else [loop.max_batches]
        stage = trainer.state.stage.value
        return {"validate": "validation", "predict": "prediction"}.get(stage, str(stage)) + _of(
            loop.batch_progress.current.processed, sum(batches)
        )

    def phase(self) -> str:
        """The phase at work, for how long, and how far it is, as the module says; else the time in this update."""
        module: Any = self._run.lightning_module
        since = getattr(module, "phase_since", None)
        seconds = self.pace.spent() if since is None else self.clock() - since
        time_in = duration(seconds) if seconds >= 1.0 else ""
        at_work = " ".join(word for word in (phase_of(module), time_in) if word)
        return ", ".join(word for word in (at_work, str(getattr(module, "phase_detail", "") or "")) if word)

    def left(self) -> str:
        """Time that the rest of the updates will take; empty where that is not known."""
        trainer = self._run
        remaining = total_updates(trainer) - updates_done(trainer) if trainer.state.fn == "fit" else 0.0
        seconds = self.pace.left(remaining) if 0 < remaining < math.inf else None
        return "" if seconds is None else duration(seconds)

    def _take_metrics(self, trainer: Any) -> None:
        self._metrics = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """A new run."""
        super().setup(trainer, pl_module, stage)
        self.pace = Pace(clock=self.clock)
        self._run, self._metrics, self._ended, self._set_up = trainer, {}, False, self.clock()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """End the signs of life."""
        super().teardown(trainer, pl_module, stage)
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same."""
        self._end()

    def _begin_pulse(self) -> None:
        if not self.watched and self._pulse is None and self._run.is_global_zero:
            self._pulse = Heartbeat()
            self._pulse.doing, self._pulse.redraw, self.on_line = self.line, self.redraw, self._pulse.touch
            self._pulse.__enter__()

    def _end(self) -> None:
        self._ended = True
        if self._pulse is not None:
            self._pulse.__exit__(None, None, None)
            self._pulse = None

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """First words."""
        self._begin_pulse()
        self.show(force=True)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """The first update begins; later ones begin where the one before ends."""
        self.pace.begin()
        self.show()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """An update is done."""
        self.pace.lap()
        self._take_metrics(trainer)
        self.show(force=updates_done(trainer) == total_updates(trainer))

    def on_rollout_end(self, trainer: L.Trainer, *_: Any) -> None:
        """A part of an update is done."""
        self.show()

    on_scores = on_minibatch_end = on_rollout_end

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Last words."""
        self._take_metrics(trainer)
        self.show()
        self._ended = True

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Validation is no part of an update's time."""
        self._begin_pulse()
        self.pace.pause()
        self.show()

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        """On with the update."""
        self.pace.go_on()
        self._take_metrics(trainer)
        self._ended = trainer.state.fn != "fit"

    def on_test_start(self, trainer: L.Trainer, *_: Any) -> None:
        """First words."""
        self._begin_pulse()
        self.show()

    def on_predict_start(self, trainer: L.Trainer, *_: Any) -> None:
        """First words."""
        self.on_test_start(trainer)

    def on_test_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Last words."""
        self._ended = True

    def on_predict_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Last words."""
        self.on_test_end(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Words now and then."""
        self.show()

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Words now and then."""
        self.show()

    def on_predict_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Words now and then."""
        self.show()

    def __getstate__(self) -> dict[str, Any]:
        """What belongs to this process stays here."""
        return vars(self) | {"_run": None, "_trainer": None, "_pulse": None, "on_line": _nothing}


def _nothing() -> None:
    """Nobody is told."""


def _of(done: int, total: float) -> str:
    return f" {done}" if total == math.inf else f" {done}/{total:.0f}"
