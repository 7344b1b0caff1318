"""Run PPO on the film-review task and store what it learned for which KL: see :mod:`benchmarks.learning`.

``python -m benchmarks.learning.run FOLDER --data_root DIR --name NAME --seeds 0 1 2 [--config C] [--KEY VALUE ...]``

All other arguments go to ``lit-ppo fit --config sentiment``, so a run can be anything that the command can do.
``NAME.json`` of the results holds commit, arguments, the contents of configuration files of one's own, and every
measured point.
"""

import argparse
import contextlib
import json
import shlex
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from benchmarks.learning.task import N_PROMPTS, RESULTS, ROOT
from lit_ppo.cli.main import main as fit


def commit() -> str:
    """The commit, with a + if files have changed."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "lit_ppo", "callbacks", "configs", "benchmarks/learning")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def configuration(asked: argparse.Namespace, output: Path) -> dict[str, Any]:
    """What every run has on top of ``sentiment``: the callback that measures, and no other work."""
    frontier = {
        "output": str(output),
        "folder": str(asked.folder.resolve()),
        "data_root": str(asked.data_root.resolve()),
        "updates": asked.measure,
        "averages": asked.averages,
        "samples": asked.samples,
        "prompts": asked.prompts,
    }
    return {
        "stages": [],
        "data_root": str(asked.data_root.resolve()),
        "trainer": {
            "limit_val_batches": 0,
            "logger": False,
            "default_root_dir": str(output.parent),
            "callbacks+": [{"class_path": "benchmarks.learning.frontier.Frontier", "init_args": frontier}],
        },
    }


def run(asked: argparse.Namespace, seed: int, arguments: list[str]) -> list[dict[str, Any]]:
    """One run; returns its points."""
    with tempfile.TemporaryDirectory() as place:
        output, config = Path(place) / "points.json", Path(place) / "measured.yaml"
        config.write_text(yaml.safe_dump(configuration(asked, output)))
        arguments = ["--config", "sentiment", *arguments, "--config", str(config)]
        with contextlib.chdir(asked.folder):
            code = fit(["fit", *arguments, "--seed_everything", str(seed), "--trainer.max_steps", str(asked.updates)])
        if code:
            raise SystemExit(code)
        points: list[dict[str, Any]] = json.loads(output.read_text())
    return points


def parse(words: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, and those of ``lit-ppo fit``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.run", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="Of the checkpoints.")
    parser.add_argument("--data_root", type=Path, required=True, help="Folder of the film reviews.")
    parser.add_argument("--name", required=True, help="Of the result.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--updates", type=int, default=32, help="Of 128 responses unless the arguments say otherwise.")
    parser.add_argument("--measure", type=int, nargs="+", help="After which updates; by default the last.")
    parser.add_argument("--averages", type=float, nargs="*", default=[], help="Decays of averages of the weights.")
    parser.add_argument("--samples", type=int, default=16, help="Responses per held-out prompt.")
    parser.add_argument("--prompts", type=int, default=N_PROMPTS, help="Held-out prompts.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked, arguments = parser.parse_known_args(words)
    asked.measure = asked.measure or [asked.updates]
    return asked, arguments


def own_configs(arguments: list[str]) -> dict[str, Path]:
    """Files given as ``--config``; shipped configurations have names instead."""
    given = [value for word, value in pairwise(arguments) if word == "--config"]
    return {value: Path(value).resolve() for value in given if Path(value).is_file()}


def main() -> None:
    """Run all seeds; a result of the same name gets them added."""
    asked, arguments = parse()
    files = own_configs(arguments)
    configs = {path.name: yaml.safe_load(path.read_text()) for path in files.values()}
    told = shlex.join(files[word].name if word in files else word for word in arguments)
    arguments = [str(files.get(word, word)) for word in arguments]  # a run has another working directory
    file = asked.results / f"{asked.name}.json"
    asked.results.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"name": asked.name, "runs": []}
    for seed in asked.seeds:
        points = run(asked, seed, arguments)
        facts = {"seed": seed, "commit": commit(), "updates": asked.updates, "arguments": told, "configs": configs}
        stored["runs"] = [old for old in stored["runs"] if old["seed"] != seed] + [facts | {"points": points}]
        file.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
