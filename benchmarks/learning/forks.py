"""Many runs of the film-review task from one process: each in a fork, so that imports happen once.

Runs are stored in one file as they end. The same command again runs what is missing.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from benchmarks.learning.run import commit, run
from benchmarks.learning.task import N_PROMPTS, ROOT

LIMIT = ROOT / "benchmarks" / "results" / "learning_mean" / "limit.json"
SETTING = [
    *("--config", "sentiment/trained_critic"),
    *("--model.generation.max_new_tokens", "24", "--trainer.precision", "bf16-mixed"),  # those of the limit
]
"""On top of ``sentiment``."""


class Job(NamedTuple):
    """One run.

    Args:
        name: Of the result.
        seed: Of the run.
        config: A configuration on top of ``SETTING``.
    """

    name: str
    seed: int
    config: dict[str, Any]


def config(callbacks: list[Any], **model: Any) -> dict[str, Any]:
    """A configuration with these callbacks and ``CollapseMonitor``, no others, and arguments of LitPPO."""
    watched = [*callbacks, {"class_path": "CollapseMonitor"}]
    return {"model": {"class_path": "LitPPO", "init_args": model}, "trainer": {"callbacks": watched}}


def parser(doc: str | None, results: str, updates: int, measure: list[int] | None = None) -> argparse.ArgumentParser:
    """What all commands of many runs have in common; all other arguments go to ``lit-ppo fit``.

    Args:
        doc: Of the command.
        results: Name of the folder of results.
        updates: Of a run.
        measure: After which updates to measure; None: the last.
    """
    made = argparse.ArgumentParser(description=doc, allow_abbrev=False)
    made.add_argument("folder", type=Path, help="Of the checkpoints.")
    made.add_argument("--data_root", type=Path, required=True, help="Folder of the film reviews.")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--updates", type=int, default=updates, help="Of 128 responses unless the arguments say else.")
    made.add_argument("--measure", type=int, nargs="+", default=measure, help="After which updates.")
    made.add_argument("--samples", type=int, default=8, help="Responses per held-out prompt.")
    made.add_argument("--prompts", type=int, default=N_PROMPTS, help="Held-out prompts.")
    made.add_argument("--only", nargs="+", help="Names of runs.")
    made.add_argument("--limit", type=Path, default=LIMIT, help="limit.json of benchmarks.learning.limit.")
    made.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / results)
    made.add_argument("--page", type=Path, help="A page whose table to replace.")
    made.add_argument("--figure", type=Path)
    made.add_argument("--lock", type=Path, help="A file to lock for each run, for commands that share a core.")
    made.add_argument("--report", action="store_true", help="Run nothing.")
    return made


def limit_of(asked: argparse.Namespace) -> dict[str, Any]:
    """The limit, from which gains are measured."""
    limit: dict[str, Any] = json.loads(asked.limit.read_text())
    return limit


def run_all(asked: argparse.Namespace, arguments: list[str], jobs: list[Job], file: Path) -> list[dict[str, Any]]:
    """Run the film-review jobs that are not stored yet, in order; returns all that is stored.

    Args:
        asked: Of :func:`parser`.
        arguments: For ``lit-ppo fit``.
        jobs: The runs.
        file: Where they are stored.
    """
    asked.averages, asked.measure = [], asked.measure or [asked.updates]

    def facts(job: Job) -> dict[str, Any]:
        own = _without(job.config, asked.data_root, asked.folder)
        return {"updates": asked.updates, "arguments": shlex.join([*SETTING, *arguments]), "config": own}

    return run_missing(asked, jobs, file, partial(run_one, asked, arguments), facts)


def run_missing(
    asked: argparse.Namespace,
    jobs: list[Job],
    file: Path,
    measure: Callable[[Job], list[dict[str, Any]]],
    facts: Callable[[Job], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Run the jobs that are not stored yet, in order; returns all that is stored.

    Args:
        asked: ``folder`` for the output; ``only`` these names; ``report``: run nothing; ``lock``, see :func:`locked`.
        jobs: The runs.
        file: Where they are stored.
        measure: Returns the points of a run; called in a fork.
        facts: What is stored of a run besides.
    """
    stored: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else []
    done = {(old["name"], old["seed"]) for old in stored if old["points"]}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for job in jobs:
        if asked.report or (job.name, job.seed) in done or job.name not in (asked.only or [job.name]):
            continue
        with locked(asked.lock):
            found = in_fork(partial(measure, job), log=asked.folder / f"{file.stem}.log")
        stored = [old for old in stored if (old["name"], old["seed"]) != (job.name, job.seed)]
        stored.append({"name": job.name, "seed": job.seed, "commit": commit(), **facts(job), **found})
        file.write_text(json.dumps({"runs": stored}, indent=1) + "\n")
        print(job.name, job.seed, found["error"] or found["points"][-1], flush=True)
    return stored


def _without(config: dict[str, Any], *folders: Path) -> dict[str, Any]:
    """The configuration without places on this machine."""
    text = json.dumps(config)
    for folder in folders:
        text = text.replace(f"{folder}/", "")
    kept: dict[str, Any] = json.loads(text)
    return kept


def run_one(asked: argparse.Namespace, arguments: list[str], job: Job) -> list[dict[str, Any]]:
    """The points of a run."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as own:
        own.write(yaml.safe_dump(job.config))
        own.flush()
        return run(asked, job.seed, [*SETTING, *arguments, "--config", own.name])


@contextlib.contextmanager
def locked(file: Path | None) -> Iterator[None]:
    """Hold the lock of a file, if one is given."""
    if file is None:
        yield
        return
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def in_fork(call: Callable[[], list[dict[str, Any]]], log: Path) -> dict[str, Any]:
    """Points that a call returns in a fork of this process, and the last line of its output if it fails.

    Args:
        call: Returns the points.
        log: Gets the output.
    """
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "points.json"
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            with log.open("w", buffering=1) as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                sys.stdout = sys.stderr = out
                try:
                    output.write_text(json.dumps(call()))
                except BaseException:  # a fork must not go on with its parent's work
                    traceback.print_exc()
                out.flush()
                os._exit(0)
        os.waitpid(child, 0)
        if output.exists():
            return {"points": json.loads(output.read_text()), "error": None}
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return {"points": [], "error": (errors or lines or ["no output"])[-1][-300:]}
