"""Time and memory of an update against response length, batch and vocabulary, as JSON and as a drawing.

    python benchmarks/scaling.py --trl-python .venv-trl/bin/python --output scaling.json --figure scaling.svg

One axis is varied at a time around one job; every run is a process of its own.
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.jobs import JOBS, Job
from benchmarks.runner import Runner
from benchmarks.speed import commit, summary

AXES: dict[str, list[int]] = {
    "longest_response": [32, 64, 128, 256, 512, 1024],
    "prompts": [8, 16, 32, 64],
    "vocabulary": [8_000, 32_000, 128_000],
}
TITLES = {"longest_response": "longest response", "prompts": "prompts", "vocabulary": "vocabulary"}
MEASURES = {"seconds": "seconds an update", "peak_bytes": "memory, MiB"}
COLORS = {"ours": "#792ee5", "trl": "#888888"}
NAMES = {"ours": "LitPPO", "trl": "TRL"}
WIDTH, HEIGHT, MARGIN = 230, 170, 45


def varied(job: Job, axis: str, value: int) -> Job:
    """The job with one size changed. The mean response length stays the same fraction of the longest."""
    changes: dict[str, Any] = {axis: value}
    if axis == "longest_response" and job.mean_response is not None:
        changes["mean_response"] = job.mean_response * value / job.longest_response
    return replace(job, **changes)


def measure(runner: Runner, job: Job, axes: list[str], sides: list[str], limit: int) -> list[dict[str, Any]]:
    """One run for each point and side.

    Args:
        runner: Starts the workers.
        job: What is varied.
        axes: Which of :data:`AXES`.
        sides: ``"ours"``, ``"trl"``.
        limit: Largest value of the response length, for machines with little memory.
    """
    points = []
    for axis in axes:
        for value in AXES[axis]:
            if axis == "longest_response" and value > limit:
                continue
            with runner.job_files(varied(job, axis, value)) as folder:
                for side in sides:
                    run = summary(runner.run(side, folder, {}))
                    points.append({"axis": axis, "value": value, "side": side} | run)
                    print(f"{axis} {value} {side}: {run['seconds']:.2f} s, {run['peak_bytes'] / 2**20:.0f} MiB")
    return points


def draw(points: list[dict[str, Any]]) -> str:
    """The points as SVG: a panel for each axis and measure, both scales logarithmic."""
    axes = list(dict.fromkeys(point["axis"] for point in points))
    panels = []
    for row, measure_name in enumerate(MEASURES):
        for column, axis in enumerate(axes):
            chosen = [point for point in points if point["axis"] == axis]
            where = f'<g transform="translate({column * WIDTH},{row * HEIGHT})">'
            panels.append(where + panel(chosen, measure_name) + "</g>")
    size = f'width="{WIDTH * len(axes)}" height="{HEIGHT * len(MEASURES)}"'
    style = 'font-family="sans-serif" font-size="10"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(panels) + "\n</svg>\n"


def panel(points: list[dict[str, Any]], measure_name: str) -> str:
    """One panel: a line for each side, ticks at the values that were run and at the ends."""
    unit = 2**20 if measure_name == "peak_bytes" else 1
    xs = sorted({point["value"] for point in points})
    ys = [point[measure_name] / unit for point in points]
    low, high = min(ys), max(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            MARGIN + _share(x, xs[0], xs[-1]) * (WIDTH - MARGIN - 15),
            HEIGHT - 35 - _share(y, low, high) * (HEIGHT - 60),
        )

    drawn = [f'<text x="{MARGIN}" y="14">{MEASURES[measure_name]}, by {TITLES[points[0]["axis"]]}</text>']
    for side in dict.fromkeys(point["side"] for point in points):
        own = [place(point["value"], point[measure_name] / unit) for point in points if point["side"] == side]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in own)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{COLORS[side]}" stroke-width="2"/>')
        x, y = own[-1]
        drawn.append(f'<text x="{x:.1f}" y="{y - 4:.1f}" text-anchor="end" fill="{COLORS[side]}">{NAMES[side]}</text>')
    for x in xs:
        drawn.append(f'<text x="{place(x, low)[0]:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{x}</text>')
    for y in (low, high):
        drawn.append(f'<text x="{MARGIN - 5}" y="{place(xs[0], y)[1] + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    return "".join(drawn)


def _share(x: float, low: float, high: float) -> float:
    return 0.5 if low == high else math.log(x / low) / math.log(high / low)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=list(JOBS), default="narrow")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--limit", type=int, default=1024, help="longest response to try")
    parser.add_argument("--trl-python", help="interpreter that has TRL; without it LitPPO runs alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--output", type=Path, help="where to write the points as JSON")
    parser.add_argument("--figure", type=Path, help="where to write the drawing as SVG")
    args = parser.parse_args(argv)
    runner = Runner(args.threads, args.precision, args.trl_python)
    sides = ["ours", "trl"] if args.trl_python else ["ours"]
    points = measure(runner, JOBS[args.job], args.axes, sides, args.limit)
    asked = {"job": args.job, "threads": args.threads, "precision": args.precision}
    if args.output:
        args.output.write_text(json.dumps({"commit": commit(), "asked": asked, "points": points}, indent=1) + "\n")
    if args.figure:
        args.figure.write_text(draw(points))


if __name__ == "__main__":
    main()
