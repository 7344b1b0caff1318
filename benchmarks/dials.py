"""Draw docs/dials.svg: the curves of a healthy run and of two that go wrong.

``python -m benchmarks.dials runs/quickstart docs/dials.svg``, in a folder where the first two stages of the
quickstart are done. It takes a few minutes on a laptop.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
from matplotlib.figure import Figure

from benchmarks.quickstart_runs import RESPONSES, RUNS, make_module, varied
from lit_ppo import PromptDataModule
from lit_ppo.callbacks import CollapseMonitor

CHOSEN = {"quickstart, seed 1": "healthy", "no KL, rate 1e-3": "collapsing", "one pattern": "one pattern"}
COLORS = {"healthy": "#2a9d3a", "collapsing": "#d1495b", "one pattern": "#edae49"}
PANELS = {
    "objective/score": "score",
    "objective/score_std": "spread of the scores",
    "objective/kl": "KL, nats a response",
    "policy/entropy": "entropy, nats a token",
    "collapse/distinct": "distinct bigrams",
    "collapse/opening": "most frequent opening",
    "value/explained_variance": "explained variance",
    "collapse/level": "CollapseMonitor's level",
    "gold": "positive, grammatical and varied",
}


class Record(L.Callback):
    """Keeps what is logged, and the gold measure."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._gold = 0.0

    def on_update_end(self, trainer: L.Trainer, pl_module: Any, experience: Any) -> None:
        """The gold measure of the responses."""
        scores = varied(experience.prompts, experience.responses)
        self._gold = sum(scores) / len(scores)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """What the update has logged."""
        self.rows.append(
            {name: float(value) for name, value in trainer.callback_metrics.items()} | {"gold": self._gold}
        )


def record(folder: Path, name: str, seed: int, updates: int) -> list[dict[str, float]]:
    """One run's curves.

    Args:
        folder: The quickstart's.
        name: One of ``RUNS``.
        seed: Of the run.
        updates: How many.
    """
    kept = Record()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=updates,
        max_epochs=-1,
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[*RUNS[name].callbacks(), CollapseMonitor(), kept],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = PromptDataModule(str(folder / "data/prompts.jsonl"), batch_size=RESPONSES, seed=seed)
        trainer.fit(make_module(folder, seed, **RUNS[name].changes), data)
    return kept.rows


def draw(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw one panel per curve, with one line per run.

    Args:
        runs: Rows by the run's title.
        path: Of the drawing.
    """
    matplotlib.rcParams.update({"svg.hashsalt": "dials", "svg.fonttype": "none", "font.size": 8})
    figure = Figure(figsize=(9.0, 6.5), layout="constrained")
    for axes, (tag, title) in zip(figure.subplots(3, 3).flat, PANELS.items(), strict=True):
        for name, rows in runs.items():
            axes.plot(
                range(1, len(rows) + 1), [row[tag] for row in rows], color=COLORS[name], label=name, linewidth=1.3
            )
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if tag == "value/explained_variance":
            axes.set_ylim(-1.0, 1.0)  # if all returns are alike, it is unbounded noise
    figure.supxlabel("update")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(runs), frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    names = list(RUNS)
    drawn = {}
    for chosen, called in CHOSEN.items():
        drawn[called] = record(Path(sys.argv[1]), chosen, seed=100 + names.index(chosen), updates=40)
    draw(drawn, Path(sys.argv[2]))
