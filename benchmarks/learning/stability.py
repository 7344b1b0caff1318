"""Settings under which vanilla PPO collapses, and what saves it: the KL penalty, PPO-max's callbacks, or both.

``python -m benchmarks.learning.stability FOLDER --data_root DIR [--seeds 0 1 2 3 4] [--updates 12] [--KEY VALUE ...]``

A run has collapsed if ``CollapseMonitor`` raised an alarm. ``stability.json`` of the results has all runs.
"""

import argparse
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.learning import report
from benchmarks.learning.ablation import last_points
from benchmarks.learning.forks import Job, config, limit_of, parser, run_all
from benchmarks.learning.variants import max_callbacks

HEAD = ["setting", "tricks", "seeds", "alarms", "at update", "rules", "KL", "gain", "judge's gain"]
KL_COEF = 0.1  # the task's
SETTINGS: dict[str, dict[str, Any]] = {
    "rate 1e-3": {"rate": 1e-3},
    "rate 2e-3, no clipping": {"rate": 2e-3, "clip_range": None},
    "rate 5e-4, 4 passes, no clipping": {"rate": 5e-4, "ppo_epochs": 4, "clip_range": None},
}
"""What differs from ``sentiment/trained_critic``: the actor's rate, and arguments of LitPPO."""
NONE, PENALTY, CALLBACKS, BOTH = "none", "KL penalty", "callbacks of PPO-max", "PPO-max: both"


def jobs(data_root: Path, seeds: list[int]) -> list[Job]:
    """For each seed and setting: neither trick, each, both."""
    callbacks = list(max_callbacks(data_root).values())
    found = []
    for seed in seeds:
        for name, setting in SETTINGS.items():
            for tricks in (NONE, BOTH, PENALTY, CALLBACKS):
                kl_coef = KL_COEF if tricks in (PENALTY, BOTH) else 0.0
                optimizer = {"class_path": "torch.optim.AdamW", "init_args": _adamw(setting["rate"])}
                rest = {key: value for key, value in setting.items() if key != "rate"}
                model = {"kl_coef": kl_coef, "actor_optimizer": optimizer, **rest}
                own = config(callbacks if tricks in (CALLBACKS, BOTH) else [], **model)
                found.append(Job(f"{name}: {tricks}", seed, own))
    return found


def _adamw(rate: float) -> dict[str, Any]:
    return {"lr": rate, "weight_decay": 0.0, "fused": True}


def rows(points: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each setting and kind of tricks."""
    groups = defaultdict(list)
    for point in points:
        groups[point["name"]].append(point)
    table = []
    for name in sorted(groups, key=lambda name: name.split(": ", 1)[0]):  # stable: tricks stay in order
        group = groups[name]
        setting, tricks = name.split(": ", 1)
        alarms = [point["rule"].split(" at ") for point in group if point["collapsed"]]
        updates = sorted(int(update) for _, update in alarms)
        rules = ", ".join(rule for rule, _ in Counter(rule for rule, _ in alarms).most_common())
        when = f"{updates[0]} to {updates[-1]}" if updates else ""
        kl, gain, judged = (mean(p[key] for p in group) for key in ("kl", "gain", "judge_gain"))
        numbers = [f"{kl:.1f}", f"{gain:+.2f}", f"{judged:+.2f}"]
        table.append([setting, tricks, str(len(group)), f"{len(alarms)}/{len(group)}", when, rules, *numbers])
    return table


def main() -> None:
    """Run what is missing; print the table, and write it where it is asked for."""
    made = parser(__doc__, "ablation", updates=12)
    made.set_defaults(seeds=[0, 1, 2, 3, 4])
    asked, arguments = made.parse_known_args()
    asked.data_root = asked.data_root.resolve()
    stored = run_all(asked, arguments, jobs(asked.data_root, asked.seeds), asked.results / "stability.json")
    show(asked, stored)


def show(asked: argparse.Namespace, stored: list[dict[str, Any]]) -> None:
    """The table."""
    points = last_points(limit_of(asked), [run for run in stored if run["points"]])
    table = report.markdown(HEAD, rows(points))
    print(table, *(f"failed: {run['name']}, {run['seed']}: {run['error']}\n" for run in stored if not run["points"]))
    (asked.results / "stability.md").write_text(table)
    if asked.page:
        report.write_into(asked.page, "stability", table)


if __name__ == "__main__":
    main()
