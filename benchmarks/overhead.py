"""Measure the cost of the monitors: ``python -m benchmarks.overhead runs/quickstart [--pairs 4] [--updates 101]``.

It runs the quickstart's PPO stage with all monitors as configured in ``configs/monitors`` and without monitors, in
turns. There are two measures, both in processor seconds. The trainer's profiler gives the time in each monitor's hooks
relative to the rest of the run; it hardly varies between runs, but misses the cost of logging. The ratio of both kinds
of runs misses nothing. The work of monitors at the start and end of a run is reported separately from that in its
updates. A run has enough updates for the monitors that act every 50 updates.

A run with monitors is bit for bit the same as one without. Other work on the machine only slows it down, so for each
update the fastest of all pairs counts. Building models and reading texts, before the first update, is left out.
"""

import argparse
import tempfile
import warnings
from collections import defaultdict
from operator import truediv
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import lightning as L
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import Profiler

import lit_ppo.callbacks
from benchmarks.quickstart_runs import make_module, positive
from lit_ppo import PromptDataModule, TextDataModule
from lit_ppo.callbacks import AdvantageNormalization

ROOT = Path(__file__).parent.parent
NAMES = ("AlignmentTax", "Cockpit", "CollapseMonitor", "RewardHackingMonitor", "SampleLogger")


class Spent(NamedTuple):
    """Seconds in a monitor's hooks.

    Args:
        updates: In the updates.
        once: At the start and end of training.
    """

    updates: float = 0.0
    once: float = 0.0


class Hooks(Profiler):
    """Seconds per callback in all hooks, except those before and after the run. Calls inside a hook count for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, Spent] = defaultdict(Spent)
        self._started: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        self._started[action_name] = process_time()

    def stop(self, action_name: str) -> None:
        spent = process_time() - self._started.pop(action_name)
        name, _, hook = action_name.removeprefix("[Callback]").partition(".")
        updates, once = self.seconds[name]
        if hook in ("on_train_start", "on_train_end"):
            self.seconds[name] = Spent(updates, once + spent)
        elif hook not in ("setup", "teardown"):
            self.seconds[name] = Spent(updates + spent, once)


def monitors(folder: Path) -> list[L.Callback]:
    """All monitors as in ``configs/monitors``; those that need data or a gold measure get the quickstart's.

    Args:
        folder: The quickstart's.
    """
    made = []
    for path in sorted((ROOT / "configs/monitors").glob("*.yaml")):
        (entry,) = yaml.safe_load(path.read_text())["trainer"]["callbacks+"]
        arguments = entry.get("init_args") or {}
        if "data" in arguments:
            text = arguments["data"]["init_args"] | {"path": str(folder / "data/reviews.jsonl")}
            arguments["data"] = TextDataModule(**text)
        if entry["class_path"] == "RewardHackingMonitor":
            arguments["gold"] = positive
        made.append(getattr(lit_ppo.callbacks, entry["class_path"])(**arguments))
    return made


def run(
    folder: Path, seed: int, updates: int, callbacks: list[L.Callback], root: str
) -> tuple[list[float], dict[str, Spent]]:
    """Seconds of each update, and of each monitor's hooks.

    Args:
        folder: The quickstart's.
        seed: Of the run.
        updates: How many.
        callbacks: The monitors.
        root: Folder for the logs.
    """
    profiler = Hooks()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=updates,
        max_epochs=-1,
        logger=TensorBoardLogger(root, name=""),
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        profiler=profiler,
        callbacks=[AdvantageNormalization(), *callbacks, clock := Clock()],
    )
    files = {name: str(folder / f"data/{name}.jsonl") for name in ("prompts", "prompts_eval")}
    data = PromptDataModule(files["prompts"], val_path=files["prompts_eval"], batch_size=128, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(make_module(folder, seed), data)
    return clock.laps, {name: seconds for name, seconds in profiler.seconds.items() if name in NAMES}


class Clock(L.Callback):
    """Seconds of each update, with all other callbacks; the last lap is the work after the last update."""

    def __init__(self) -> None:
        self.laps: list[float] = []

    def on_fit_start(self, *_: Any) -> None:
        self._start = process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        now = process_time()
        self.laps.append(now - self._start)
        self._start = now

    on_train_end = on_train_batch_end


def table(pairs: list[tuple[list[float], list[float], dict[str, Spent]]]) -> str:
    """Medians over pairs of runs, and the ratio of both kinds of runs, with the fastest of each update.

    Args:
        pairs: Seconds of each update without monitors, with them, and in the hooks of each.
    """
    updates = len(pairs[0][0]) - 1
    rows = ["monitor | milliseconds an update | share of the update | once a run, updates"]
    for names in (*((name,) for name in NAMES), NAMES):
        spent, once = (
            [sum(hooks.get(name, Spent())[kind] for name in names) for _, _, hooks in pairs] for kind in (0, 1)
        )
        rest = [sum(watched) - sum(map(sum, hooks.values())) for _, watched, hooks in pairs]
        share, start = (median(map(truediv, cost, rest)) for cost in (spent, once))
        name = names[0] if len(names) == 1 else "all"
        rows.append(f"{name} | {1000 * median(spent) / updates:.1f} | {share:.2%} | {start * updates:.2f}")
    alone, watched = (sum(map(min, zip(*(pair[kind] for pair in pairs), strict=True))) for kind in (0, 1))
    rows.append(f"runs with all over runs with none: {watched / alone - 1.0:+.2%} of {alone / updates:.3f} s an update")
    return "\n".join(rows)


def main() -> None:
    """Measure pairs of runs; the order within a pair alternates."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--updates", type=int, default=101)
    asked = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as logs:
        run(asked.folder, 0, 2, monitors(asked.folder), logs)  # first calls are slower
        for pair in range(asked.pairs):
            found = {}
            for watched in (False, True) if pair % 2 else (True, False):
                callbacks = monitors(asked.folder) if watched else []
                found[watched] = run(asked.folder, pair, asked.updates, callbacks, logs)
            pairs.append((found[False][0], *found[True]))
    print(table(pairs))


if __name__ == "__main__":
    main()
