"""When the monitors warn: in runs made to collapse, to hack the reward and to overfit, and in healthy ones.

``python -m benchmarks.monitors runs/quickstart [run ...]``, in a folder where the first two stages of the quickstart
are done. Every run has ``CollapseMonitor`` and ``RewardHackingMonitor``. Gold measures come from the grammar's parser,
which training does not see: by default the fraction of responses that it can parse and that are positive. Prints one
row per run: the update at which each monitor first warned, and the update at which the gold of training responses had
fallen half a standard deviation (of single responses at the start) below its best. ``held out`` is the gold of the
final model on prompts that were never trained on; for runs that go back, the final model is that of the best update.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from benchmarks.quickstart_runs import RESPONSES, RUNS, Run, make_data, make_module
from lit_ppo.callbacks import CollapseMonitor, RewardHackingMonitor

HELD_OUT = 256  # prompts
VERDICTS = {1: "overfitting", 2: "reward hacking"}


class Watch(L.Callback):
    """Keeps the gold measure of the training responses and what the monitors logged, for each update.

    Args:
        gold: The measure.
    """

    def __init__(self, gold: Callable[[list[str], list[str]], list[float]]) -> None:
        self.measure = gold
        self.gold: list[float] = []
        self.level: list[int] = []
        self.verdict: list[int] = []
        self.deviation = 0.0  # of single responses at the start

    def on_update_end(self, trainer: L.Trainer, pl_module: Any, experience: Any) -> None:
        scores = torch.tensor(self.measure(experience.prompts, experience.responses))
        self.deviation = self.deviation if self.gold else float(scores.std(correction=0))
        self.gold.append(float(scores.mean()))
        self.level.append(int(trainer.callback_metrics["collapse/level"]))
        self.verdict.append(int(trainer.callback_metrics.get("hacking/verdict", 0)))

    def fallen(self) -> int | None:
        """The first of two consecutive updates half a starting standard deviation below the best before them.

        Two, because the gold of 64 responses varies by a tenth by chance.
        """
        low = [value < max(self.gold[: i + 1]) - 0.5 * self.deviation for i, value in enumerate(self.gold)]
        return first(map(all, pairwise(low)))


def first(found: Any) -> int | None:
    """Number of the first update for which it is true."""
    return next((update for update, true in enumerate(found, start=1) if true), None)


class Result(NamedTuple):
    """The outcome of a run.

    Args:
        watch: Its course.
        said: The monitors' warnings.
        behind: The update at which gold fell behind, which is no verdict yet.
        held_out: Gold of the final model.
        back: The update that it went back to.
    """

    watch: Watch
    said: list[str]
    behind: int | None
    held_out: float
    back: int | None


def run(folder: Path, job: Run, seed: int) -> Result:
    """One run.

    Args:
        folder: The quickstart's.
        job: What to run.
        seed: Of the run.
    """
    module = make_module(folder, seed, **job.changes)
    watch = Watch(job.gold)
    hacking = RewardHackingMonitor(job.gold, every=5, then=job.then)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=job.updates,
            max_epochs=-1,
            default_root_dir=place,
            logger=False,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[*job.callbacks(), CollapseMonitor(), hacking, watch],
        )
        data = make_data(folder, job, RESPONSES // module.samples_per_prompt, seed, Path(place))
        trainer.fit(module, data)
        kept = list(Path(place).glob("checkpoints/best-step-*.ckpt")) if trainer.should_stop else []
    end = module.rollout(data.peek("val", HELD_OUT), samples_per_prompt=1, logprobs=False, stream="end")
    held_out = job.gold(end.prompts, end.responses)
    words = [str(warning.message) for warning in said if "Monitor: " in str(warning.message)]
    back = int(kept[0].stem.rpartition("-")[2]) if kept else None
    early = [told.removeprefix("gold falls behind at update ") for told in hacking.told]
    behind = next((int(update) for update in early if update.isdigit()), None)
    return Result(watch, words, behind, sum(held_out) / len(held_out), back)


HEADER = (
    "run | updates | warning | alarm | by | behind | verdict | which | gold: start | best | at warning | at verdict | "
    "end | fallen at | back to | held out"
)


def row(name: str, result: Result) -> str:
    """A line of the table."""
    watch = result.watch
    warned, alarmed = (first(level >= bound for level in watch.level) for bound in (1, 2))
    by = next((words.split("(")[-1].split(" is at")[0] for words in result.said if "CollapseMonitor" in words), None)
    judged = first(watch.verdict)
    which = None if judged is None else VERDICTS[watch.verdict[judged - 1]]
    at = [None if update is None else watch.gold[update - 1] for update in (warned, judged)]
    course = [watch.gold[0], max(watch.gold), *at, watch.gold[-1]]
    cells = [name, len(watch.gold), warned, alarmed, by, result.behind, judged, which, *course]
    cells += [watch.fallen(), result.back, result.held_out]
    return " | ".join(
        "-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells
    )


def seed_of(name: str) -> int:
    """The seed of a run. A run that goes back has the seed of the one that does not."""
    return 100 + list(RUNS).index(name.removesuffix(", going back"))


if __name__ == "__main__":
    print(HEADER, flush=True)
    for chosen in sys.argv[2:] or RUNS:
        print(row(chosen, run(Path(sys.argv[1]), RUNS[chosen], seed_of(chosen))), flush=True)
