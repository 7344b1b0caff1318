"""The table and the figure of all results: ``python -m benchmarks.learning.report [RESULTS] [--page P] [--figure F]``.

Efficiency is the gain of a policy over the gain of the limit at the same KL. Text between ``<!-- NAME -->`` and
``<!-- /NAME -->`` of the page is replaced, where NAME is that of the folder of results.
"""

import argparse
import json
from collections import defaultdict
from math import isfinite, nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.learning.task import RESULTS

HEAD = ["run", "weights", "seeds", "episodes", "KL", "gain", "limit", "efficiency", "judge's gain", "CPU seconds"]


def load(results: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The limit, and every measured point with the name of its run and its efficiency."""
    limit = json.loads((results / "limit.json").read_text())
    points = []
    for file in sorted(results.glob("*.json")):
        stored = json.loads(file.read_text())
        # other files hold the limit and what else was measured
        points += measured(limit, [run | {"name": stored["name"]} for run in stored.get("runs", [])])
    return limit, points


def measured(limit: dict[str, Any], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every point of some runs with the run's name, seed and arguments, and its gains and efficiency."""
    kls, gains = ([0.0, *(p[key] for p in limit["limit"])] for key in ("kl", "gain"))
    points = []
    for run in runs:
        facts = {name: run[name] for name in ("name", "seed", "arguments")}
        for point in run["points"]:
            # near 0 the limit grows with the root of the KL; beyond its last point it is not known
            bound = float(np.interp(np.sqrt(point["kl"]), np.sqrt(kls), gains, right=np.nan))
            gain, judged = point["score"] - limit["score"], point["judge"] - limit["judge"]
            own = {"gain": gain, "judge_gain": judged, "limit": bound, "efficiency": gain / (bound or nan)}
            points.append(point | facts | own)
    return points


def rows(points: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each run, number of episodes and kind of weights: means over seeds."""
    groups = defaultdict(list)
    for point in points:
        groups[point["name"], point["episodes"], point["average"] or 0.0].append(point)
    table = []
    for (name, episodes, average), group in groups.items():
        efficiency = [point["efficiency"] for point in group]
        spread = f" ± {stdev(efficiency):.1%}" if len(group) > 1 else ""
        known = isfinite(sum(efficiency))
        values = {key: mean(p[key] for p in group) for key in ("kl", "gain", "limit", "judge_gain", "cpu_seconds")}
        table.append(
            [
                name,
                f"average {average}" if average else "last",
                str(len(group)),
                f"{episodes:,}",
                f"{values['kl']:.2f}",
                f"{values['gain']:+.2f}",
                f"{values['limit']:.2f}" if known else "-",
                f"{mean(efficiency):.1%}{spread}" if known else "-",
                f"{values['judge_gain']:+.2f}",
                f"{values['cpu_seconds']:.0f}",
            ]
        )
    return table


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body]) + "\n"


def write_into(page: Path, name: str, table: str) -> None:
    """Replace what is between the comments of this name."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = page.read_text().partition(start)
    page.write_text(f"{before}{start}\n{table}{end}{rest.partition(end)[2]}")


def draw(
    limit: dict[str, Any],
    points: list[dict[str, Any]],
    file: Path,
    names: list[str] | None,
    notes: list[tuple[float, float, str]] | None = None,
) -> None:
    """Score and judge's score against KL, with the limit and best-of-n; points with ``collapsed`` are crosses.

    Args:
        limit: Of :func:`load`.
        points: Of :func:`load`.
        file: PNG.
        names: Of runs; None: all.
        notes: KL, gain and text in the panel of the score.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    curve, best = limit["limit"], limit["best_of"]
    kls = [0.0, *(p["kl"] for p in curve)]
    for panel, of_limit, of_policy, title in (
        (panels[0], "gain", "gain", "score"),
        (panels[1], "judge", "judge_gain", "judge's score"),
    ):
        panel.set_prop_cycle(color=plt.colormaps["tab20"].colors)
        panel.plot(kls, [0.0, *(p[of_limit] for p in curve)], color="black", label="limit")
        if of_limit == "gain":
            panel.fill_between(kls, [0.0, *(p["low"] for p in curve)], [0.0, *(p["high"] for p in curve)], alpha=0.2)
        panel.plot([p["kl"] for p in best], [p[of_limit] for p in best], "k.:", label="best of n")
        for name in names or sorted({point["name"] for point in points}):
            own = [point for point in points if point["name"] == name]
            (line,) = panel.plot([p["kl"] for p in own], [p[of_policy] for p in own], "o", markersize=4, label=name)
            crossed = [point for point in own if point.get("collapsed")]
            panel.plot([p["kl"] for p in crossed], [p[of_policy] for p in crossed], "x", color=line.get_color())
        panel.set(xlabel="KL to the reference, nats per response", ylabel=f"gain of the {title}")
        panel.set_xlim(0, 6)
    for kl, gain, text in notes or []:
        panels[0].annotate(text, (kl, gain), xytext=(4, -4), textcoords="offset points", fontsize=6, clip_on=True)
    figure.tight_layout(rect=(0, 0, 0.81, 1))  # the names are beside the panels, where they hide nothing
    figure.legend(*panels[0].get_legend_handles_labels(), loc="center right", fontsize=7)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def main() -> None:
    """Print the table; write it into a page and draw the figure, where they are given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--names", nargs="+", help="Only these runs in the figure.")
    parser.add_argument("--rows", nargs="+", help="Only these runs in the table.")
    asked = parser.parse_args()
    limit, points = load(asked.results)
    table = markdown(HEAD, rows([point for point in points if asked.rows is None or point["name"] in asked.rows]))
    print(table)
    if asked.page:
        write_into(asked.page, asked.results.name, table)
    if asked.figure:
        draw(limit, points, asked.figure, asked.names)


if __name__ == "__main__":
    main()
