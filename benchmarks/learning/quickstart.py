"""The quickstart's settings, changed one at a time: ``python -m benchmarks.learning.quickstart FOLDER``.

``[--seeds 0 1 2] [--only NAME ...] [--report] [--page FILE]``

``FOLDER`` is where ``lit-ppo fit --config quickstart`` has run. A run is judged by what its settings maximise: the
score of held-out prompts less ``kl_coef`` times their KL. ``quickstart.json`` of the results has all runs.
"""

import argparse
import contextlib
import csv
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from benchmarks.learning import report
from benchmarks.learning.forks import Job, run_missing
from benchmarks.learning.task import ROOT
from lit_ppo.cli.main import main as fit

HEAD = ["setting", "seeds", "score", "KL", "score less 0.6 KL", "CPU s"]
KL_COEF = 0.6  # of all runs
SETTINGS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "lam 1.0": {"advantages": {"init_args": {"lam": 1.0}}},
    "lam 0.8": {"advantages": {"init_args": {"lam": 0.8}}},
    "lam 0.5": {"advantages": {"init_args": {"lam": 0.5}}},
    "critic: actor": {"critic": "actor"},
    "ppo_epochs 1": {"ppo_epochs": 1},
    "ppo_epochs 4": {"ppo_epochs": 4},
    "minibatch_size 64": {"minibatch_size": 64},
    "actor's rate 2.5e-4": {"actor_optimizer": {"init_args": {"lr": 2.5e-4}}},
    "actor's rate 1e-3": {"actor_optimizer": {"init_args": {"lr": 1e-3}}},
    "cosine": {"actor_scheduler": {"class_path": "lit_ppo.WarmupCosine", "init_args": {"warmup_steps": 1}}},
}
"""Arguments of LitPPO, on top of the shipped configuration."""


def configuration(model: dict[str, Any], output: Path) -> dict[str, Any]:
    """What a run has on top of ``quickstart``: its arguments, and numbers in a file."""
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(output)}}
    return {
        "stages": [],
        "model": {"class_path": "LitPPO", "init_args": {"kl_coef": KL_COEF, **model}},
        "trainer": {"logger": logger, "default_root_dir": str(output)},
        "export": {"dirpath": str(output / "model")},
    }


def measure(folder: Path, job: Job) -> list[dict[str, Any]]:
    """The validations of one run; the last with its CPU time."""
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / "own.yaml"
        config.write_text(yaml.safe_dump(configuration(job.config, Path(place))))
        before = time.process_time()
        with contextlib.chdir(folder):
            code = fit(["fit", "--config", "quickstart", "--config", str(config), "--seed_everything", str(job.seed)])
        if code:
            raise SystemExit(code)
        seconds = round(time.process_time() - before, 1)
        (metrics,) = Path(place).rglob("metrics.csv")
        validated = [row for row in csv.DictReader(metrics.read_text().splitlines()) if row["val/score"]]
    points = [{"score": float(row["val/score"]), "kl": float(row["val/kl"])} for row in validated]
    points[-1]["cpu_seconds"] = seconds  # of the whole command, without imports
    return points


def rows(runs: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each setting."""
    groups = defaultdict(list)
    for run in runs:
        if run["points"]:
            groups[run["name"]].append(run)
    table = []
    for name in SETTINGS:
        if name not in groups:
            continue
        ends = [run["points"][-1] for run in groups[name]]
        reached = [end["score"] - KL_COEF * end["kl"] for end in ends]
        spread = f" ± {stdev(reached):.2f}" if len(reached) > 1 else ""
        numbers = [f"{mean(end[key] for end in ends):.2f}" for key in ("score", "kl")]
        seconds = mean(end["cpu_seconds"] for end in ends)
        table.append([name, str(len(ends)), *numbers, f"{mean(reached):.2f}{spread}", f"{seconds:.0f}"])
    return table


def main() -> None:
    """Run what is missing; print the table, and write it where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="In which the quickstart has run.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="Names of settings.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "quickstart")
    parser.add_argument("--lock", type=Path, help="A file to lock for each run, for commands that share a core.")
    parser.add_argument("--page", type=Path, help="A page whose table to replace.")
    parser.add_argument("--report", action="store_true", help="Run nothing.")
    asked = parser.parse_args()
    jobs = [Job(name, seed, changed) for seed in asked.seeds for name, changed in SETTINGS.items()]
    file = asked.results / "quickstart.json"
    stored = run_missing(asked, jobs, file, partial(measure, asked.folder), lambda job: {"arguments": job.config})
    table = report.markdown(HEAD, rows(stored))
    print(table)
    if asked.page:
        report.write_into(asked.page, "quickstart", table)


if __name__ == "__main__":
    main()
