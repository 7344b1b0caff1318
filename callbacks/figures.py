"""Figures of a run; matplotlib is loaded with the first one."""

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from lit_ppo.functional import best_of_n_kl

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, BLUE = "#222222", "#8c8c8c", "#1f6fb4"
BINS = 24
LEGEND: dict[str, Any] = {
    "frameon": False, "loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2, "ncols": 3,
    "handlelength": 1.4, "columnspacing": 1.2,
}  # fmt: skip


def score_against_kl(kl: Sequence[float], scores: Sequence[float], best_of: Sequence[float]) -> "Figure":
    """Mean score of each update against its KL to the reference, compared with best-of-n sampling at the start.

    Args:
        kl: KL to the reference of each update, nats per response.
        scores: Mean score of each update.
        best_of: Mean score of the best of 1, 2, 3, ... samples of the starting policy; empty for no line.
    """
    figure, axes = _axes("KL to the reference, nats per response", "mean score")
    if best_of:
        distances = [best_of_n_kl(n) for n in range(1, len(best_of) + 1)]
        label = f"starting policy, best of 1 to {len(best_of)}"
        axes.plot(distances, best_of, color=INK, linestyle="--", linewidth=1.2, label=label)
    points = [(n, x, y) for n, (x, y) in enumerate(zip(kl, scores, strict=True)) if isfinite(x) and isfinite(y)]
    updates, across, up = zip(*points, strict=True) if points else ((), (), ())
    axes.plot(across, up, color=GREY, linewidth=0.6, alpha=0.6)
    drawn = axes.scatter(across, up, c=updates, cmap="viridis", vmin=0, vmax=max(len(kl) - 1, 1), s=18, zorder=3)
    drawn.set_label("this run")
    figure.colorbar(drawn, ax=axes, label="update", pad=0.02)
    axes.legend(**LEGEND)
    return figure


def score_distributions(now: Sequence[float], start: Sequence[float], update: int) -> "Figure":
    """Histograms of the scores of single responses, now and at the start, with the same bins.

    Args:
        now: Scores of one update.
        start: Scores of the first update.
        update: Number of the update, counted from 0.
    """
    figure, axes = _axes("score", "fraction of the responses")
    low, high = min(*now, *start), max(*now, *start)
    edges = [low + (high - low or 1.0) * i / BINS for i in range(BINS + 1)]
    for values, color, label in ((start, GREY, "at the start"), (now, BLUE, f"now, update {update}")):
        weights = [1.0 / len(values)] * len(values)
        axes.hist(values, edges, weights=weights, histtype="step", linewidth=1.6, color=color, label=label)
        axes.axvline(sum(values) / len(values), color=color, linestyle=":", linewidth=1.2)
    axes.plot([], [], color=INK, linestyle=":", linewidth=1.2, label="means")
    axes.legend(**LEGEND)
    return figure


def _axes(across: str, up: str) -> tuple["Figure", "Axes"]:
    """An empty figure, made without pyplot, which would keep a reference and choose a backend for the process."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.4), dpi=120)  # TensorBoard shows it at about two thirds of its size
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.15, top=0.9)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
