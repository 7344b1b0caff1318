"""What the monitors cost: ``python -m benchmarks.overhead runs/quickstart [--pairs 4] [--updates 101]``.

The quickstart's PPO stage with all monitors as their configurations have them, and with none, in turns. Two measures,
in seconds of the processor: what the trainer's profiler finds in each monitor's hooks over the rest of the run, which
hardly differs from run to run, but misses what logging their numbers costs; and the ratio of the runs, which misses
nothing. What monitors do once, when a run begins and when it ends, is told apart from what they do in its updates, of
which there are so many that each monitor's turn comes (every 50 updates, at most).

A run with monitors is the same run, to the bit: of each update the fastest of all pairs is taken, as whatever
else the machine does only ever slows it down. Building models and reading texts, before the first update, is left out.
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
        once: When the training begins and when it ends.
    """

    updates: float = 0.0
    once: float = 0.0


class Hooks(Profiler):
    """Seconds by callback, in whatever hook but those before and after the run; what a hook calls is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, Spent] = defaultdict(Spent)
        self._started: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        """A hook begins."""
        self._started[action_name] = process_time()

    def stop(self, action_name: str) -> None:
        """It ends."""
        spent = process_time() - self._started.pop(action_name)
        name, _, hook = action_name.removeprefix("[Callback]").partition(".")
        updates, once = self.seconds[name]
        if hook in ("on_train_start", "on_train_end"):
            self.seconds[name] = Spent(updates, once + spent)
        elif hook not in ("setup", "teardown"):
            self.seconds[name] = Spent(updates + spent, once)


def monitors(folder: Path) -> list[L.Callback]:
    """One of each, by its file in ``configs/monitors``; those that need something of the user's get the quickstart's.

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
    """Seconds of each update, behind all other callbacks; the last lap is what comes behind the last update."""

    def __init__(self) -> None:
        self.laps: list[float] = []

    def on_fit_start(self, *_: Any) -> None:
        """The models are built."""
        self._start = process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        """An update is over."""
        now = process_time()
        self.laps.append(now - self._start)
        self._start = now

    on_train_end = on_train_batch_end


def table(pairs: list[tuple[list[float], list[float], dict[str, Spent]]]) -> str:
    """Medians over pairs of runs; and the ratio of both kinds of run, of each update the fastest.

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
    """Measure pairs of runs, in turns, each pair the other way round than the one before."""
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
