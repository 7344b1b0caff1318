"""Write the tables of a page from results: ``python benchmarks/report.py docs/performance.md benchmarks/results/*``.

Results are what ``benchmarks/speed.py`` and ``benchmarks/scaling.py`` wrote.

Text between ``<!-- tables -->`` and ``<!-- /tables -->`` is replaced.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import PHASES

START, END = "<!-- tables -->", "<!-- /tables -->"
NAMES = {"ours": "LitPPO", "trl": "TRL"}


def update(page: Path, results: list[Path]) -> None:
    """Replace the tables of a page.

    Args:
        page: Markdown with both markers.
        results: Files that ``benchmarks/speed.py`` wrote.

    Raises:
        ValueError: The page lacks a marker.
    """
    text = page.read_text()
    if START not in text or END not in text:
        raise ValueError(f"{page}: needs the lines {START} and {END}")
    before, rest = text.split(START, 1)
    after = rest.split(END, 1)[1]
    tables = "\n".join(
        curves(found["points"]) if "points" in found else section(found)
        for found in (json.loads(path.read_text()) for path in results)
    )
    page.write_text(f"{before}{START}\n{tables}{END}{after}")


def section(results: dict[str, Any]) -> str:
    """One file of results: how it was measured, then a table of times and one of phases."""
    asked, jobs = results["asked"], results["jobs"]
    settings = f"LitPPO {_settings(asked['ours'])}, TRL {_settings(asked['trl'])}"
    parts = [
        f"{settings}; {asked['precision']}, threads: {asked['threads']}, commit {results['commit']}. Medians of "
        f"{asked['pairs']} runs each, in turns; in brackets the lowest and highest ratio of a pair.\n",
        table(
            ["job", "side", "seconds", "TRL / LitPPO", "tokens/s", "share of matmul peak", "memory, MiB"],
            [_speed_row(name, job, side) for name, job in jobs.items() for side in _sides(job)],
        ),
        table(
            ["seconds of", "side", *PHASES],
            [
                [name, NAMES[side], *(f"{_median(job, side, 'phases', phase):.2f}" for phase in PHASES)]
                for name, job in jobs.items()
                for side in _sides(job)
            ],
        ),
    ]
    chosen = [
        f"{NAMES[side]} on {name}: `{json.dumps(job['settings'][side])}`"
        for name, job in jobs.items()
        for side in _sides(job)
        if asked[side] == "tuned"
    ]
    if chosen:
        parts.append("The fastest of each grid:\n\n" + "\n".join(f"- {line}" for line in chosen) + "\n")
    agreements = {name: job["agreement"]["largest_difference"] for name, job in jobs.items() if "agreement" in job}
    if agreements:
        columns = list(next(iter(agreements.values())))
        rows = [[name, *(f"{found[column]:.1e}" for column in columns)] for name, found in agreements.items()]
        parts.append(table(["largest difference", *(column.replace("_", " ") for column in columns)], rows))
    return "\n".join(parts) + "\n"


def curves(points: list[dict[str, Any]]) -> str:
    """The points of ``benchmarks/scaling.py`` as a table: seconds and MiB of both sides."""
    found = {(point["axis"], point["value"], point["side"]): point for point in points}
    rows = []
    for axis, value in dict.fromkeys((point["axis"], point["value"]) for point in points):
        runs = [found[axis, value, side] for side in NAMES if (axis, value, side) in found]
        cells = [f"{run['seconds']:.2f} s, {run['peak_bytes'] / 2**20:,.0f} MiB" for run in runs]
        rows.append([axis.replace("_", " "), f"{value:,}", *cells])
    sides = [NAMES[side] for side in NAMES if any(point["side"] == side for point in points)]
    return table(["varied", "value", *sides], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def _speed_row(name: str, job: dict[str, Any], side: str) -> list[str]:
    ratio = ""
    if side == "trl":
        seconds = job["ratio"]["seconds"]
        ratio = f"{seconds['median']:.2f} ({seconds['lowest']:.2f}-{seconds['highest']:.2f})"
    return [
        name,
        NAMES[side],
        f"{_median(job, side, 'seconds'):.2f}",
        ratio,
        f"{_median(job, side, 'tokens_per_second'):.1f}",
        f"{_median(job, side, 'share_of_peak'):.0%}",
        f"{_median(job, side, 'peak_bytes') / 2**20:,.0f}",
    ]


def _median(job: dict[str, Any], side: str, *keys: str) -> float:
    values = []
    for pair in job["pairs"]:
        value: Any = pair[side]
        for key in keys:
            value = value[key]
        values.append(value)
    return median(values)


def _sides(job: dict[str, Any]) -> list[str]:
    return [side for side in NAMES if side in job["pairs"][0]]


def _settings(asked: str) -> str:
    return asked if asked in ("defaults", "tuned") else f"`{asked}`"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    update(args.page, args.results)
