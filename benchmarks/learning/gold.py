"""Over-optimisation of the reward model, by a judge that was trained on other data, and what holds it off.

``python -m benchmarks.learning.gold FOLDER --data_root DIR [--seeds 0] [--updates 20] [--KEY VALUE ...]``

The reward model of these runs, the proxy, is trained on few reviews, as in Gao et al. 2023, arXiv:2210.10760. Runs
have a high rate and differ in what restrains them. ``gold.json`` of the results has all runs.
"""

import argparse
import gzip
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.learning import report
from benchmarks.learning.forks import Job, config, parser, run_all
from benchmarks.learning.task import MODELS, ROOT
from benchmarks.learning.verdicts import collapse

HEAD = ["restraint", "seed", "best judge", "at update", "at KL", "end: KL", "proxy", "judge", "judge has fallen",
        "CollapseMonitor", "RewardHackingMonitor"]  # fmt: skip
EDGES, REVIEWS, STEPS = "imdb_train_edges.jsonl.gz", 200, 60
RATE = 5e-4
FALL = 0.25  # standard deviations of the judge's score of single responses
OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": RATE, "weight_decay": 0.0, "fused": True}}
FREE = "none"
RESTRAINTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    FREE: ([], {}),
    "kl_coef 0.1": ([], {"kl_coef": 0.1}),
    "KLLoss 0.1": ([{"class_path": "KLLoss", "init_args": {"coef": 0.1, "kind": "k2"}}], {}),
    "AdaptiveKL 2": (
        [{"class_path": "AdaptiveKL", "init_args": {"target": 2.0, "horizon": 500}}],
        {"kl_coef": 0.1},
    ),
    "KLEarlyStop 0.005": ([{"class_path": "KLEarlyStop", "init_args": {"target": 0.005}}], {}),
    "ReferenceUpdate 8, kl_coef 0.1": (
        [{"class_path": "ReferenceUpdate", "init_args": {"every": 8}}],
        {"kl_coef": 0.1},
    ),
    "clip_range 0.05": ([], {"clip_range": 0.05}),
    "clip_range null": ([], {"clip_range": None}),
}
"""Callbacks and arguments of LitPPO, whose ``kl_coef`` is 0 unless they say otherwise and ``clip_range`` 0.2."""


def make_proxy(folder: Path, data_root: Path, reviews: int = REVIEWS, steps: int = STEPS) -> Path:
    """A reward model of the first reviews only, trained once."""
    place = folder / MODELS / f"proxy-{reviews}"
    if not (place / "model").is_dir():
        place.mkdir(parents=True, exist_ok=True)
        few = place / "edges.jsonl.gz"
        with gzip.open(data_root / EDGES, "rb") as lines, gzip.open(few, "wb") as kept:
            kept.writelines(islice(lines, reviews))
        places = ["--data.path", str(few.resolve()), "--export.dirpath", str((place / "model").resolve())]
        size = ["--trainer.max_steps", str(steps), "--trainer.max_epochs", "-1", "--trainer.val_check_interval", "null"]
        command = [sys.executable, "-m", "lit_ppo", "fit", "--config", "sentiment/reward", *places, *size]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        subprocess.run(command, cwd=folder, env=environment, check=True)
    return place / "model"


def jobs(folder: Path, proxy: Path, seeds: list[int]) -> list[Job]:
    """The run without restraint for all seeds, then the others."""
    judge = folder / MODELS / "judge" / "model"
    sources = {
        "proxy": {"source": _model(proxy, aggregation="mean"), "weight": 1.0},
        "judge": {"source": _model(judge), "weight": 0.0},
    }
    monitor = {"class_path": "RewardHackingMonitor", "init_args": {"gold": "judge", "every": 2}}
    found = []
    for name, (callbacks, changes) in RESTRAINTS.items():
        model = {"kl_coef": 0.0, "critic": str(proxy), "rewards": sources, "actor_optimizer": OPTIMIZER} | changes
        found += [Job(name, seed, config([*callbacks, monitor], **model)) for seed in seeds]
    return sorted(found, key=lambda job: job.name != FREE)


def _model(path: Path, **arguments: Any) -> dict[str, Any]:
    return {"class_path": "RewardModel", "init_args": {"model": str(path), "batch_size": 128, **arguments}}


def fallen(judged: list[float], drop: float) -> int | None:
    """Index of the first point at which the judge's score is more than ``drop`` below its best before, or None.

    >>> fallen([0.0, 1.0, 0.9, 0.4, 0.3], 0.5)
    3
    """
    best = judged[0]
    for index, value in enumerate(judged):
        best = max(best, value)
        if value < best - drop:
            return index
    return None


def rows(runs: list[dict[str, Any]], deviation: float) -> list[list[str]]:
    """A row for each run; gains are from the first point, the reference.

    Args:
        runs: As stored.
        deviation: Of the judge's score of single responses of the reference.
    """
    table = []
    for run in runs:
        points = run["points"]
        judged = [point["judge"] - points[0]["judge"] for point in points]
        best, fell, end = int(np.argmax(judged)), fallen(judged, FALL * deviation), points[-1]
        at = f"update {points[fell]['update']}" if fell is not None else "no"
        gained = [f"{end['kl']:.1f}", f"{end['score'] - points[0]['score']:+.2f}", f"{judged[-1]:+.2f}"]
        top = [f"{judged[best]:+.2f}", str(points[best]["update"]), f"{points[best]['kl']:.1f}"]
        told = end["told"]
        said = "; ".join(told["RewardHackingMonitor"])
        table.append([run["name"], str(run["seed"]), *top, *gained, at, _first(told["CollapseMonitor"]), said])
    return table


def _first(told: list[str]) -> str:
    """The first warning and the first alarm."""
    warned = [words for words in told if words.startswith("warning")][:1]
    level, update, rule = collapse(told)
    return "; ".join([*warned, *([f"alarm at update {update} ({rule})"] if level == 2 else [])])


def draw(runs: list[dict[str, Any]], file: Path) -> None:
    """The proxy's and the judge's gain against the root of the KL, a line for each run."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(run["name"] for run in runs))}
    for panel, key, title in ((panels[0], "score", "proxy"), (panels[1], "judge", "judge")):
        seen = set()
        for run in runs:
            name, points = run["name"], run["points"]
            gains = [point[key] - points[0][key] for point in points]
            label = name if name not in seen else None
            panel.plot([p["kl"] ** 0.5 for p in points], gains, ".-", color=colors[name], label=label)
            seen.add(name)
        panel.set(xlabel="root of the KL to the reference, nats per response", ylabel=f"gain of the {title}")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def main() -> None:
    """Run what is missing; print the table, and write it and the figure where they are asked for."""
    made = parser(__doc__, "ablation", updates=20, measure=list(range(0, 21, 2)))
    made.set_defaults(seeds=[0])
    made.add_argument("--deviation", type=float, default=2.18, help="Of the judge's scores of the reference.")
    asked, arguments = made.parse_known_args()
    asked.folder, asked.data_root = asked.folder.resolve(), asked.data_root.resolve()
    proxy = make_proxy(asked.folder, asked.data_root)
    stored = run_all(asked, arguments, jobs(asked.folder, proxy, asked.seeds), asked.results / "gold.json")
    show(asked, [run for run in stored if run["points"]])


def show(asked: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """The table and the figure."""
    table = report.markdown(HEAD, rows(runs, asked.deviation))
    print(table)
    (asked.results / "gold.md").write_text(table)
    if asked.page:
        report.write_into(asked.page, "gold", table)
    if asked.figure:
        draw(runs, asked.figure)


if __name__ == "__main__":
    main()
