"""Time LitPPO, and TRL's PPOTrainer if it is installed, on the same tokens, in turns.

    python benchmarks/speed.py --jobs small medium --pairs 5 --trl-python .venv-trl/bin/python --trl tuned

Every run has its own process. If both sides run, it first checks that they compute the same numbers.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import agreement, tuning
from benchmarks.jobs import JOBS, Job
from benchmarks.measure import PHASES
from benchmarks.runner import ROOT, Runner


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=["small"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--updates", type=int, default=1, help="measured updates per run")
    parser.add_argument("--warmup", type=int, default=1, help="updates before the measured ones")
    parser.add_argument("--trl-python", help="Python of an environment with TRL; without it only LitPPO runs")
    for side in ("ours", "trl"):
        parser.add_argument(f"--{side}", default="defaults", help="defaults, tuned, or a JSON dict of settings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--no-agreement", action="store_true", help="do not compare the numbers first")
    parser.add_argument("--output", type=Path, help="JSON file for all results")
    return parser.parse_args(argv)


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """The medians over the measured updates of a run."""
    seconds = [sum(update.values()) for update in run["updates"]]
    return {
        "seconds": median(seconds),
        "phases": {name: median(update[name] for update in run["updates"]) for name in PHASES},
        "tokens_per_second": run["tokens"] / median(seconds),
        "peak_bytes": run["peak_bytes"],
        "loaded_bytes": run["loaded_bytes"],
        "optimizer_steps": run["optimizer_steps"],
    }


def share_of_peak(run: dict[str, Any], matmul: float) -> float:
    """Operations that the optimizer steps need, divided by those of matrix products in the same time."""
    took = median(update["forward"] + update["backward"] for update in run["updates"])
    return run["flops"] / (took * matmul)


def ratio(pairs: list[dict[str, Any]], key: str) -> dict[str, float]:
    """TRL divided by ours, pair by pair, so that both ran under the same conditions."""
    ratios = sorted(pair["trl"][key] / pair["ours"][key] for pair in pairs)
    return {"median": median(ratios), "lowest": ratios[0], "highest": ratios[-1]}


def choose(runner: Runner, side: str, asked: str, job: Job, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Settings of a side, and the grid that led to them."""
    if asked == "defaults":
        return {}, []
    if asked != "tuned":
        return json.loads(asked), []
    points = []
    for settings, seconds in tuning.tune(
        tuning.grid(side, job), lambda settings: summary(runner.run(side, folder, settings))["seconds"]
    ):
        print(f"  {side:4} {seconds:8.2f} s  {json.dumps(settings)}", flush=True)
        points.append({"settings": settings, "seconds": seconds})
    return min(points, key=lambda point: point["seconds"])["settings"], points


def measure(runner: Runner, job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one job."""
    sides = ("ours", "trl") if runner.trl_python else ("ours",)
    result: dict[str, Any] = {"job": vars(job), "pairs": [], "grid": {}}
    if len(sides) == 2 and not args.no_agreement:
        result["agreement"] = agreement.check(runner, job)
        print(f"{job.name}: {json.dumps(result['agreement'])}", flush=True)
    with runner.job_files(job) as folder:
        settings = {}
        for side in sides:
            settings[side], result["grid"][side] = choose(runner, side, getattr(args, side), job, folder)
        for number in range(args.pairs):
            order = sides if number % 2 == 0 else sides[::-1]
            runs = {side: runner.run(side, folder, settings[side]) for side in order}
            matmul = runs["ours"]["matmul"]
            pair = {side: summary(runs[side]) | {"share_of_peak": share_of_peak(runs[side], matmul)} for side in sides}
            pair["matmul"] = matmul
            result["pairs"].append(pair)
            for side in sides:
                print(line(f"{job.name} {number + 1} {side}", pair[side]), flush=True)
        result["settings"] = {side: runs[side]["settings"] for side in sides}
        result["in_force"] = runs.get("trl", {}).get("in_force")
    if len(sides) == 2:
        result["ratio"] = {key: ratio(result["pairs"], key) for key in ("seconds", "peak_bytes")}
        print(f"{job.name}: TRL over ours {json.dumps(result['ratio'])}", flush=True)
    return result


def line(name: str, run: dict[str, Any]) -> str:
    """One line for the console."""
    phases = "  ".join(f"{phase} {seconds:.2f}" for phase, seconds in run["phases"].items())
    return (
        f"{name:20} {run['seconds']:8.2f} s  {run['tokens_per_second']:7.1f} tokens/s  "
        f"{run['peak_bytes'] / 2**20:6.0f} MiB  {run['share_of_peak']:.0%} of peak  ({phases})"
    )


def commit() -> str:
    """The commit that was measured."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the command."""
    args = arguments(argv)
    runner = Runner(args.threads, args.precision, args.trl_python, warmup=args.warmup, updates=args.updates)
    results: dict[str, Any] = {
        "commit": commit(),
        "machine": platform.machine(),
        "asked": {
            name: getattr(args, name) for name in ("threads", "precision", "pairs", "warmup", "updates", "ours", "trl")
        },
        "jobs": {},
    }
    for name in args.jobs:
        results["jobs"][name] = measure(runner, JOBS[name], args)
        if args.output:  # after each job: the next may take long
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
