"""Whether a trick helped: the gain against that of vanilla PPO at the same KL, beyond the seeds' spread."""

import re
from collections import defaultdict
from math import isnan, nan, sqrt
from statistics import mean, variance
from typing import Any, NamedTuple

import numpy as np

ERRORS = 2.0  # standard errors of the difference from which it counts
HELPED, SAME, HURT, UNKNOWN = "helped", "no difference", "hurt", "-"


class Verdict(NamedTuple):
    """Of one variant.

    Args:
        difference: Of the mean gain from the base's, each less that of vanilla at its KL; nan if unknown.
        margin: What the spread of seeds, or of samples if it is larger, explains.
        word: The verdict.
    """

    difference: float
    margin: float
    word: str


def vanilla_at(anchors: list[list[dict[str, Any]]], kl: float) -> float:
    """Efficiency of vanilla PPO at a KL, between the means of its runs linear in the root of the KL.

    Args:
        anchors: Points of vanilla runs, each list with one ``kl_coef``.
        kl: Beyond the first and the last anchor, theirs counts.

    >>> runs = [[{"kl": 1.0, "efficiency": 0.4}], [{"kl": 4.0, "efficiency": 0.6}]]
    >>> [round(vanilla_at(runs, kl), 3) for kl in (0.5, 1.0, 2.25, 9.0)]
    [0.4, 0.4, 0.5, 0.6]
    """
    places = sorted((mean(p["kl"] for p in points), mean(p["efficiency"] for p in points)) for points in anchors)
    kls, efficiencies = zip(*places, strict=True)
    return float(np.interp(sqrt(kl), np.sqrt(kls), efficiencies))


def pooled(groups: list[list[float]]) -> float:
    """Standard deviation within groups, from those of two values or more; nan without any.

    >>> round(pooled([[0.0, 2.0], [5.0], [1.0, 2.0, 3.0]]), 3)  # sums of squares 2 and 2, 3 degrees of freedom
    1.155
    """
    several = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    return sqrt(sum((len(group) - 1) * variance(group) for group in several) / freedom) if freedom else nan


def verdicts(points: list[dict[str, Any]], bases: dict[str, str], anchors: list[str]) -> dict[str, Verdict]:
    """The verdict on each variant but the anchors.

    Args:
        points: The last point of each run, see :func:`benchmarks.learning.report.measured`.
        bases: Variant -> the variant it is compared with.
        anchors: Vanilla at several KLs; the first is vanilla itself.
    """
    groups = defaultdict(list)
    for point in points:
        groups[point["name"]].append(point)
    vanilla = [groups[name] for name in anchors if groups[name]]
    excess = {
        name: [(p["efficiency"] - vanilla_at(vanilla, p["kl"])) * p["limit"] for p in group]
        for name, group in groups.items()
        if group and vanilla
    }
    own = {name: values for name, values in excess.items() if not any(map(isnan, values))}
    sampling = mean(point["error"] for point in points) if points else 0.0
    spread = pooled(list(own.values()))  # between seeds; nan, which max keeps as its first, if there is one seed only
    spread = max(spread, sampling)
    found = {}
    for name in bases.keys() - set(anchors):
        base = bases[name]
        if name not in own or base not in own:
            found[name] = Verdict(nan, nan, UNKNOWN)
            continue
        margin = ERRORS * spread * sqrt(1 / len(own[name]) + 1 / len(own[base]))
        difference = mean(own[name]) - mean(own[base])
        found[name] = Verdict(difference, margin, _word(difference, margin))
    return found


def _word(difference: float, margin: float) -> str:
    if isnan(margin):
        return UNKNOWN
    return SAME if abs(difference) <= margin else HELPED if difference > 0 else HURT


def collapse(told: list[str]) -> tuple[int, int, str]:
    """Level, update and rule of the first of the worst words of ``CollapseMonitor``; level 0 if it said nothing.

    >>> collapse(["warning at update 3 (kl)", "alarm at update 5 (kl)", "alarm at update 6 (length)"])
    (2, 5, 'kl')
    >>> collapse([])
    (0, 0, '')
    """
    found = [re.fullmatch(r"(warning|alarm) at update (\d+) \((\w+)\)", words) for words in told]
    levels = [(1 + (m[1] == "alarm"), int(m[2]), m[3]) for m in found if m]
    return max(levels, key=lambda level: (level[0], -level[1]), default=(0, 0, ""))
