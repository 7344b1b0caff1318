"""What a run has done, in plain words, at its end."""

import time
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ppo.cli.pace import duration
from lit_ppo.cli.story import number, short, total_updates, unit, updates_done

KEPT = 10  # values at either end of a run that its first and last means are taken over, at most
MONITORED = 3  # of what a monitor has said
WORDS = {"kl": ("KL to the reference", " nats a response"), "length": ("length", " tokens")}
STATE = ("counted", "responses", "tokens")


class RunSummary(L.Callback):
    """Prints at the end of ``fit``, however it ends, what the whole run has done, on the first process.

    Updates, responses and time; how score, KL and length have moved, each a mean over the first and the last tenth of
    the updates, at most ten; what monitors have warned of. Of a module that fires no hooks, the metrics of the
    progress bar instead. Says nothing where the trainer has no progress bar. A resumed run tells of the whole run.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._forget()

    def _forget(self) -> None:
        self._updates = self._counted = self._responses = self._tokens = 0
        self._series: dict[str, list[float]] = {}  # the first and the last values
        self._held_out: dict[str, list[tuple[int, float]]] = {}  # of the first and the last validation, with the update
        self._seconds = 0.0  # of earlier parts of the run
        self._since: float | None = None
        self._resumed_after = 0
        self._lines: list[str] = []  # not printed yet

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """A new run, unless a checkpoint says otherwise."""
        if stage == "fit":
            self._forget()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Time starts now."""
        self._since, self._resumed_after = self._clock(), updates_done(trainer)
        self._updates = self._resumed_after

    def on_update_end(self, trainer: L.Trainer, pl_module: Any, experience: Any) -> None:
        """Take an update's numbers."""
        mask, scores, kl = (getattr(experience, name, None) for name in ("response_mask", "raw_scores", "kl"))
        if mask is None or scores is None:
            return
        self._counted += 1
        self._responses += len(mask)
        self._tokens += int(mask.sum())
        self._add("score", scores.mean())
        if kl is not None and getattr(experience, "ref_logprobs", None) is not None:
            self._add("kl", kl.sum(1).mean())
        self._add("length", mask.sum(1).float().mean())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Take a step's numbers, where the module hands nothing over."""
        before, self._updates = self._updates, updates_done(trainer)
        if not self._responses and self._updates != before:
            self._counted += 1
            for name, value in trainer.progress_bar_metrics.items():
                if not name.startswith("val/"):
                    self._add(short(name), value)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take what was measured on held-out data."""
        for name, value in {} if trainer.sanity_checking else trainer.callback_metrics.items():
            if name.startswith("val/"):
                self._held_out[name] = [*self._held_out.get(name, [])[:1], (self._updates, float(value))]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sum up; Lightning's bars are still on the screen."""
        total = total_updates(trainer)
        early = self._updates < total if total != float("inf") else trainer.should_stop
        self._sum_up(trainer, "Stopped early: " if early else "")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print."""
        if stage == "fit":
            self._print(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Print, if there is anything to tell."""
        asked = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        if self._since is not None and self._updates > self._resumed_after:
            self._sum_up(trainer, "Interrupted: " if asked else f"Ended by an error ({type(exception).__name__}): ")
        self._print(trainer)

    def _add(self, name: str, value: Any) -> None:
        values = self._series.setdefault(name, [])
        values.append(float(value))
        del values[KEPT : max(KEPT, len(values) - KEPT)]

    def _sum_up(self, trainer: Any, how: str) -> None:
        self._seconds, self._since = self._spent(), None
        self._lines = self.lines(trainer, how)

    def _print(self, trainer: Any) -> None:
        lines, self._lines = self._lines, []
        if lines and trainer.is_global_zero and trainer.progress_bar_callback is not None:
            print("\n" + "\n".join(lines), flush=True)

    def _spent(self) -> float:
        return self._seconds + (self._clock() - self._since if self._since is not None else 0.0)

    def lines(self, trainer: Any, how: str = "") -> list[str]:
        """The summary.

        Args:
            trainer: With the run's limits and its monitors.
            how: It has ended.
        """
        n, total, thing = self._updates, total_updates(trainer), unit(trainer)
        of = f" of {total:,.0f}" if n < total < float("inf") else ""
        before = f"{self._resumed_after:,} of them before it was resumed" if self._resumed_after else ""
        unknown = ", which are not counted here" if before and self._counted < n else ""
        amounts = [f"{self._responses:,} responses", f"{self._tokens:,} tokens"] if self._responses else []
        counted = f"{n:,}{of} {thing}{'s' * (n != 1)}" + (f" ({before}{unknown})" if before else "")
        n_ends = min(KEPT, max(1, self._counted // 10))
        ends = f"first {thing} to last" if n_ends == 1 else f"means of the first {n_ends} {thing}s to the last {n_ends}"
        head = f"{how}{', '.join([counted, *amounts])} in {duration(self._spent())}"
        if self._counted > 1:
            head += f"; {ends}"
        return [f"{head}:", *(self._moved(name, n_ends) for name in self._series), *said(trainer.callbacks)]

    def _moved(self, name: str, n_ends: int) -> str:
        """What a metric has done in training, and where it is measured, on held-out data."""
        values = self._series[name]
        ends = [sum(part) / len(part) for part in (values[:n_ends], values[-n_ends:])]
        label, per = WORDS.get(name, (name, ""))
        words = f"  {label} {moved(*ends) if self._counted > 1 else f'was {number(ends[0])}'}{per}"
        held_out = [] if name in WORDS else self._held_out.get(f"val/{name}", [])
        return words + (f" (held-out {self._measured(held_out)})" if held_out else "")

    def _measured(self, validations: list[tuple[int, float]]) -> str:
        """The first and the last measurement, with the update where that is not the last of the run."""
        values = [number(value) for _, value in validations]
        update = validations[-1][0]
        when = f" after update {update:,}" if update else " before the first update"
        words = f"from {values[0]} to {values[-1]}" if values[0] != values[-1] else values[0]
        return words + (when if update != self._updates else "")

    def state_dict(self) -> dict[str, Any]:
        """What the run has done so far."""
        state = {name: getattr(self, f"_{name}") for name in STATE}
        held_out = {name: [list(pair) for pair in pairs] for name, pairs in self._held_out.items()}
        series = {name: list(values) for name, values in self._series.items()}
        return {**state, "series": series, "held_out": held_out, "seconds": self._spent()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Tell of all of it."""
        for name in STATE:
            setattr(self, f"_{name}", state_dict[name])
        self._series = {name: list(values) for name, values in state_dict["series"].items()}
        self._held_out = {name: [(n, x) for n, x in pairs] for name, pairs in state_dict["held_out"].items()}
        self._seconds = state_dict["seconds"]


def moved(first: float, last: float) -> str:
    """What a number has done, as far as its digits show it.

    >>> moved(0.3149, 0.93), moved(22.0, 1.5), moved(1.0, 1.0001)
    ('rose from 0.315 to 0.93', 'fell from 22 to 1.5', 'stayed at 1')
    """
    before, after = number(first), number(last)
    if before == after:
        return f"stayed at {after}"
    return f"{'rose' if last > first else 'fell' if last < first else 'went'} from {before} to {after}"


def said(callbacks: list[Any]) -> list[str]:
    """What monitors have warned of: whoever keeps a list of it in ``told``."""
    watching = {type(callback).__name__: list(callback.told) for callback in callbacks if hasattr(callback, "told")}
    lines = []
    for name, told in watching.items():
        more = f", and {len(told) - MONITORED} more" if len(told) > MONITORED else ""
        lines += [f"{name}: {', '.join(told[:MONITORED])}{more}."] if told else []
    silent = [name for name, told in watching.items() if not told]
    return [*lines, *([f"{' and '.join(silent)}: no warnings."] if silent else [])]
