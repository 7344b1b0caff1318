"""Sums, which a rule checks: ``python -m benchmarks.learning.arithmetic FOLDER [--methods M ...] [--rates R ...]``.

Makes problems and an SFT model in ``FOLDER``, samples the SFT model for the limit, then trains with each method and
rate on one seed, and with each method's best rate on the others. Whatever is there already is skipped, so a run that
was ended can be started again.
"""

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.learning.arithmetic import task
from benchmarks.learning.limit import summary
from benchmarks.learning.run import commit
from benchmarks.learning.task import ROOT
from lit_ppo import LitPPO, Reinforce
from lit_ppo.cli.main import main as fit

HERE, RESULTS = Path(__file__).parent, ROOT / "benchmarks" / "results" / "arithmetic"
EIGHT = ["--data.batch_size", "32", "--model.samples_per_prompt", "8"]
FOUR_STEPS = ["--model.minibatch_size", "64"]
METHODS = {
    "ppo": ["--config", "ppo", "--data.batch_size", "256", "--model.minibatch_size", "128"],  # two passes
    "ppo-8": ["--config", "ppo", *EIGHT, "--model.minibatch_size", "128"],
    "grpo": ["--config", "grpo", *EIGHT, *FOUR_STEPS],
    "rloo": ["--config", "rloo", "--data.batch_size", "64", *FOUR_STEPS, "--model.clip_range", "0.2"],
    "reinforce_pp": ["--config", "reinforce_pp", *FOUR_STEPS],
    "grpo-1step": ["--config", "grpo", *EIGHT, "--model.minibatch_size", "256"],
    "rloo-1step": ["--config", "rloo", "--data.batch_size", "64"],
}
"""An update has 256 responses and four optimizer steps: what each method changes in its shipped configuration.
Names with ``1step`` take one step, as shipped."""
CRITIC_RATE = 5.0
"""Times the actor's, as in ``configs/sentiment.yaml``."""
SAMPLES = 64  # per held-out problem, for the limit


def run_command(arguments: list[str]) -> None:
    """``lit-ppo fit``, or the end."""
    if code := fit(["fit", *arguments]):
        raise SystemExit(code)


def prepare(asked: argparse.Namespace) -> None:
    """Problems, tokenizer, SFT, and what any policy could gain."""
    folder: Path = asked.folder
    if not (folder / "sft").is_dir():
        task.write_problems(folder, asked.solved, asked.problems, asked.held_out, asked.wrong)
        task.make_tokenizer(folder / "tokenizer")
        with contextlib.chdir(folder):
            run_command(["--config", str(HERE / "sft.yaml")])
    if not (asked.results / "limit.json").exists():
        actor, generation = str(folder / "sft"), {"max_new_tokens": 6}
        module = LitPPO(actor, critic=None, reference=None, advantages=Reinforce(), rewards=task.right,
                        generation=generation, seed=0)  # fmt: skip
        problems = task.held_out_problems(folder)
        experience = module.rollout(problems, samples_per_prompt=SAMPLES, logprobs=False, stream="reference")
        scores, by_digit = (s.double().view(len(problems), SAMPLES).numpy()
                            for s in (module.score(experience), task.judge(experience)))  # fmt: skip
        greedy = module.rollout(problems, samples_per_prompt=1, do_sample=False, logprobs=False, stream="greedy")
        facts = {
            "commit": commit(),
            "greedy": float(module.score(greedy).mean()),
            "never_right": float(np.mean(scores.max(1) == 0)),
        }
        asked.results.mkdir(parents=True, exist_ok=True)
        (asked.results / "limit.json").write_text(json.dumps(facts | summary(scores, by_digit), indent=1) + "\n")


def train(asked: argparse.Namespace, method: str, rate: float, seed: int) -> list[dict[str, Any]]:
    """One run; returns its points."""
    output = asked.folder / "points.json"
    measure = {
        "output": str(output),
        "folder": str(asked.folder),
        "data_root": str(asked.folder),
        "updates": asked.measure,
        "samples": asked.samples,
    }
    callbacks = [{"class_path": "benchmarks.learning.arithmetic.task.Accuracy", "init_args": measure}]
    (asked.folder / "run.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": callbacks}}))
    configs = ["--config", str(HERE / "task.yaml"), "--config", "run.yaml"]
    settings = {
        "seed_everything": seed,
        "trainer.max_steps": asked.updates,
        "trainer.default_root_dir": f"runs/{method}-{rate:g}-{seed}",
        "model.actor_optimizer.lr": rate,
        "model.critic_optimizer.lr": CRITIC_RATE * rate,
    }
    with contextlib.chdir(asked.folder):
        run_command([*METHODS[method], *configs, *(f"--{name}={value}" for name, value in settings.items())])
    points: list[dict[str, Any]] = json.loads(output.read_text())
    return points


def file_of(asked: argparse.Namespace, method: str, rate: float) -> Path:
    """Where the runs of a method at a rate are."""
    return Path(asked.results / f"{method}-{rate:g}.json")


def stored(asked: argparse.Namespace, method: str, rate: float) -> dict[str, Any]:
    """The runs that are there."""
    file = file_of(asked, method, rate)
    empty = {"name": f"{method} {rate:g}", "method": method, "rate": rate, "runs": []}
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else empty
    return found


def add(asked: argparse.Namespace, method: str, rate: float, seed: int) -> None:
    """Train and store, unless it is there."""
    found = stored(asked, method, rate)
    if any(run["seed"] == seed for run in found["runs"]):
        return
    facts = {"seed": seed, "commit": commit(), "arguments": " ".join(METHODS[method]), "updates": asked.updates}
    found["runs"].append(facts | {"points": train(asked, method, rate, seed)})
    file_of(asked, method, rate).write_text(json.dumps(found, indent=1) + "\n")


def best_rate(asked: argparse.Namespace, method: str) -> float:
    """The rate of the run with the most right answers at its end, on the first seed."""
    ends = {float(stored(asked, method, rate)["runs"][0]["points"][-1]["score"]): rate for rate in asked.rates}
    return float(ends[max(ends)])


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.arithmetic", description=__doc__)
    parser.add_argument("folder", type=Path, help="Of problems and models.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4, 8e-4], help="Of the actor.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="The first one has all rates.")
    parser.add_argument("--updates", type=int, default=64)
    parser.add_argument("--measure", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="After which updates.")
    parser.add_argument("--samples", type=int, default=8, help="Responses per held-out problem.")
    parser.add_argument("--solved", type=int, default=96_000, help="Problems for SFT.")
    parser.add_argument("--wrong", type=float, default=0.5, help="Share of them with a wrong digit.")
    parser.add_argument("--problems", type=int, default=16_384, help="Problems to train on.")
    parser.add_argument("--held_out", type=int, default=256, help="Problems to measure on.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(words)
    asked.folder, asked.results = asked.folder.resolve(), asked.results.resolve()
    return asked


def main(words: list[str] | None = None) -> None:
    """All runs that are missing."""
    asked = parse(words)
    torch.set_num_threads(1)
    prepare(asked)
    for method in asked.methods:
        for rate in asked.rates:
            add(asked, method, rate, asked.seeds[0])
        for seed in asked.seeds[1:]:
            add(asked, method, best_rate(asked, method), seed)


if __name__ == "__main__":
    main()
