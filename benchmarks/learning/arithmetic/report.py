"""Table and figure: ``python -m benchmarks.learning.arithmetic.report [RESULTS] [--page PAGE] [--figure FIGURE]``.

Of each method the run with the best rate, along its episodes, and the ends of the others.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.learning.report import load, markdown, write_into
from benchmarks.learning.task import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "arithmetic"
HEAD = ["method", "rate", "seeds", "episodes", "right", "right digits", "KL", "of the limit", "CPU seconds"]
Groups = dict[tuple[str, int], list[dict[str, Any]]]


def grouped(points: Iterable[dict[str, Any]]) -> Groups:
    """Points of all seeds by name and number of episodes."""
    groups: Groups = defaultdict(list)
    for point in points:
        groups[point["name"], point["episodes"]].append(point)
    return dict(
        sorted(groups.items(), key=lambda item: (item[0][0].split()[0], float(item[0][0].split()[1]), item[0][1]))
    )


def best_names(groups: Groups) -> list[str]:
    """Of each method the name with most seeds: the best on the first seed got the others; then the best end."""
    ends = {name: group for (name, _), group in groups.items()}  # the last number of episodes
    methods = {name.split()[0] for name in ends}
    return [
        max(
            (n for n in ends if n.split()[0] == method), key=lambda n: (len(ends[n]), mean(p["score"] for p in ends[n]))
        )
        for method in sorted(methods)
    ]


def drawn_names(groups: Groups) -> list[str]:
    """The best of each method, and all with several seeds."""
    best = best_names(groups)
    return list(dict.fromkeys(name for (name, _), group in groups.items() if name in best or len(group) > 1))


def rows(groups: Groups) -> list[list[str]]:
    """Best rates at each number of episodes, other rates at the last."""
    best, last = best_names(groups), max(episodes for _, episodes in groups)
    table = []
    for (name, episodes), group in groups.items():
        if name not in best and episodes < last:
            continue
        method, rate = name.split()
        scores = [point["score"] for point in group]
        spread = f" ± {stdev(scores):.1%}" if len(group) > 1 else ""
        of_limit = mean(point["efficiency"] for point in group)
        table.append(
            [
                f"**{method}**" if name in best else method,
                rate,
                str(len(group)),
                f"{episodes:,}",
                f"{mean(scores):.1%}{spread}",
                f"{mean(point['judge'] for point in group):.1%}",
                f"{mean(point['kl'] for point in group):.2f}",
                f"{of_limit:.0%}" if isfinite(of_limit) else "-",
                f"{mean(point['cpu_seconds'] for point in group):.0f}",
            ]
        )
    return table


def draw(limit: dict[str, Any], groups: Groups, file: Path) -> None:
    """Share of right answers against episodes and against KL."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    kls = [0.0, *(p["kl"] for p in limit["limit"])]
    panels[1].plot(
        kls, [limit["score"] + gain for gain in [0.0, *(p["gain"] for p in limit["limit"])]], "k", label="limit"
    )
    for name in drawn_names(groups):
        own = {episodes: group for (n, episodes), group in groups.items() if n == name}
        scores = [[point["score"] for point in group] for group in own.values()]
        episodes = [0, *own]
        line = panels[0].plot(episodes, [limit["score"], *map(mean, scores)], ".-", label=name)
        low, high = ([limit["score"], *map(edge, scores)] for edge in (min, max))
        panels[0].fill_between(episodes, low, high, alpha=0.2, color=line[0].get_color())
        kl = [mean(point["kl"] for point in group) for group in own.values()]
        panels[1].plot([0.0, *kl], [limit["score"], *map(mean, scores)], ".-", label=name)
    panels[0].set(xlabel="episodes", ylabel="right answers to held-out problems")
    panels[1].set(xlabel="KL to the SFT model, nats per response", xlim=(0, 3))
    panels[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def main(words: list[str] | None = None) -> None:
    """Print the table; write it into a page and draw the figure, where they are given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.arithmetic.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args(words)
    limit, points = load(asked.results)
    groups = grouped(points)
    table = markdown(HEAD, rows(groups))
    print(table)
    if asked.page:
        write_into(asked.page, "arithmetic", table)
    if asked.figure:
        draw(limit, groups, asked.figure)


if __name__ == "__main__":
    main()
