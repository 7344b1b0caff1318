"""Each trick alone on vanilla PPO, and PPO-max less each trick, on the film-review task.

``python -m benchmarks.learning.ablation FOLDER --data_root DIR [--seeds 0 1 2] [--updates 16] [--KEY VALUE ...]``

``FOLDER`` holds the checkpoints of :mod:`benchmarks.learning.checkpoints`. Vanilla runs first, then every variant with
the first seed, then with the others; the command can be stopped and started again. ``ablation.json`` of the results
has all runs. Gains are compared with those of vanilla PPO at the same KL, between runs of three ``kl_coef``.
"""

import argparse
from collections import defaultdict
from math import isnan
from statistics import mean, stdev
from typing import Any

from benchmarks.learning import report
from benchmarks.learning.forks import Job, limit_of, parser, run_all
from benchmarks.learning.variants import FULL, LIKE_KL, UNFIT, VANILLA, Variant, variants
from benchmarks.learning.verdicts import HELPED, HURT, Verdict, collapse, verdicts

ANCHORS = [VANILLA, *LIKE_KL]
HEAD = ["run", "seeds", "KL", "gain", "efficiency", "judge's gain", "time", "collapse", "difference", "verdict"]


def jobs(kinds: dict[str, Variant], seeds: list[int]) -> list[Job]:
    """Vanilla with all seeds, then everything seed by seed."""
    first = [Job(VANILLA, seed, kinds[VANILLA].config) for seed in seeds]
    rest = [Job(name, seed, kind.config) for seed in seeds for name, kind in kinds.items() if name != VANILLA]
    return first + rest


def last_points(limit: dict[str, Any], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last point of each run, with whether it collapsed: an alarm of ``CollapseMonitor``."""
    found = report.measured(limit, [run | {"points": run["points"][-1:]} for run in runs])
    for point in found:
        level, update, rule = collapse(point["told"]["CollapseMonitor"])
        point.update(collapsed=level == 2, level=level, rule=f"{rule} at {update}")
    return found


def rows(points: list[dict[str, Any]], kinds: dict[str, Variant], found: dict[str, Verdict]) -> list[list[str]]:
    """A row for each variant that ran, means over seeds; then those that cannot run."""
    groups = defaultdict(list)
    for point in points:
        groups[point["name"]].append(point)
    table = []
    for name, kind in kinds.items():
        if group := groups[name]:
            verdict = found.get(name)
            judged = [_difference(verdict), verdict.word] if verdict else ["-", "-"]
            row = [name, str(len(group)), *_means(group), _time(group, groups[kind.base]), _levels(group), *judged]
            table.append(row)
    return table + [[name, *["-"] * (len(HEAD) - 2), f"not run: {why}"] for name, why in UNFIT.items()]


def _time(group: list[dict[str, Any]], base: list[dict[str, Any]]) -> str:
    """CPU seconds against the base's."""
    seconds = [mean(point["cpu_seconds"] for point in points) for points in (group, base) if points]
    return f"{seconds[0] / seconds[1] - 1:+.0%}" if len(seconds) == 2 else "-"


def _means(group: list[dict[str, Any]]) -> list[str]:
    """KL, gain, efficiency and judge's gain."""
    efficiency = [point["efficiency"] for point in group]
    spread = f" ± {stdev(efficiency):.1%}" if len(group) > 1 else ""
    kl, gain, judged = (mean(p[key] for p in group) for key in ("kl", "gain", "judge_gain"))
    known = "-" if isnan(mean(efficiency)) else f"{mean(efficiency):.1%}{spread}"
    return [f"{kl:.2f}", f"{gain:+.2f}", known, f"{judged:+.2f}"]


def _difference(verdict: Verdict) -> str:
    margin = "" if isnan(verdict.margin) else f" (± {verdict.margin:.3f})"
    return "-" if isnan(verdict.difference) else f"{verdict.difference:+.3f}{margin}"


def _levels(group: list[dict[str, Any]]) -> str:
    """Alarms and warnings of ``CollapseMonitor``, in how many of the runs, and the first one's rule."""
    worst = max(group, key=lambda point: point["level"])
    if not worst["level"]:
        return ""
    n = sum(point["level"] == worst["level"] for point in group)
    return f"{'warning' if worst['level'] == 1 else 'alarm'} {n}/{len(group)}, {worst['rule']}"


def kind_of(name: str) -> str:
    """The group of a variant in the figure."""
    if name in ANCHORS:
        return "vanilla, three kl_coef"
    return "PPO-max" if name == FULL else "PPO-max less a trick" if name.startswith(FULL) else "vanilla and a trick"


def notes(points: list[dict[str, Any]], found: dict[str, Verdict]) -> list[tuple[float, float, str]]:
    """Names in the figure: of the variants that helped or hurt, or collapsed, at their means."""
    named = []
    for name, verdict in found.items():
        own = [point for point in points if point["name"] == name]
        if own and (verdict.word in (HELPED, HURT) or any(p["collapsed"] for p in own)):
            named.append((mean(p["kl"] for p in own), mean(p["gain"] for p in own), name.replace(FULL + " ", "")))
    return named


def main() -> None:
    """Run what is missing; print the table, and write it and the figure where they are asked for."""
    asked, arguments = parser(__doc__, "ablation", updates=16).parse_known_args()
    asked.data_root = asked.data_root.resolve()
    kinds = variants(asked.data_root)
    stored = run_all(asked, arguments, jobs(kinds, asked.seeds), asked.results / "ablation.json")
    show(asked, kinds, [run for run in stored if run["points"]])
    for run in stored:
        if not run["points"]:
            print(f"failed: {run['name']}, seed {run['seed']}: {run['error']}")


def show(asked: argparse.Namespace, kinds: dict[str, Variant], runs: list[dict[str, Any]]) -> None:
    """The table and the figure."""
    limit = limit_of(asked)
    points = last_points(limit, runs)
    found = verdicts(points, {name: kind.base for name, kind in kinds.items()}, ANCHORS)
    table = report.markdown(HEAD, rows(points, kinds, found))
    print(table)
    (asked.results / "ablation.md").write_text(table)
    if asked.page:
        report.write_into(asked.page, "ablation", table)
    if asked.figure:
        grouped = [point | {"name": kind_of(point["name"])} for point in points]
        names = list(dict.fromkeys(kind_of(name) for name in kinds))
        report.draw(limit, grouped, asked.figure, names, notes(points, found))


if __name__ == "__main__":
    main()
