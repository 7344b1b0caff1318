"""Train with TRL's PPOTrainer on the film-review task, and measure its actor as ours are.

``python -m benchmarks.learning.trl FOLDER --data_root DIR --python PYTHON --name NAME [--seeds 0 1 2] [--rate R] ...``

``PYTHON`` is the interpreter of an environment with ``torch==2.13.0`` and ``trl==1.12.0``. Checkpoints, prompts, their
order, episodes, updates and evaluation are those of ``benchmarks.learning.run``; its points are stored as its are, so
``benchmarks.learning.report`` has both in one table. With ``--ours NAME``, our run with the same seed
follows each of TRL's, under that name: with a trained critic, or with the arguments of ``lit-ppo fit --config
sentiment`` that are given besides those below.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.learning.run import commit
from benchmarks.learning.task import (
    MODELS,
    N_PROMPTS,
    ROOT,
    TRAINING_PROMPTS,
    held_out_prompts,
    make_scorer,
    measure,
)
from lit_ppo import LitPPO, PromptDataModule, Reinforce

RESULTS = {"last": "learning", "mean": "learning_mean"}
"""Folder of results by aggregation: each is another score with another limit."""
BATCH, MINIBATCH, VAL_FRACTION = 128, 64, 0.02  # of configs/sentiment.yaml


def prompts_of(file: Path, tokenizer: str, updates: int, seed: int, batch: int) -> list[list[list[int]]]:
    """Token ids of the prompts of each update, in the order of ``lit-ppo fit --config sentiment``."""
    data = PromptDataModule(str(file), val_fraction=VAL_FRACTION, batch_size=batch, tokenizer=tokenizer, seed=seed)
    data.setup("fit")
    rows = iter(data.train_dataloader())
    return [next(rows).prompt_ids for _ in range(updates)]


def measured(folder: Path, data_root: Path, actor: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Score, judge's score and KL of a saved actor, and its score by both readings."""
    scorers: dict[Literal["last", "mean"], Any] = {
        "last": make_scorer(folder, "reward", "last"),
        "mean": make_scorer(folder, "reward", "mean"),
    }
    judge, means = make_scorer(folder, "judge"), {}

    def judged(experience: Any) -> torch.Tensor:
        means.update({f"score_{name}": float(scorer(experience).mean()) for name, scorer in scorers.items()})
        return torch.as_tensor(judge(experience))

    module = LitPPO(
        str(actor),
        critic=None,
        reference=str(folder / MODELS / "sft" / "model"),
        rewards=scorers[asked.aggregation],
        advantages=Reinforce(),
        generation={"max_new_tokens": asked.max_new_tokens},
        seed=0,
    )
    found = measure(module, judged, held_out_prompts(data_root, asked.prompts), asked.samples)
    return {name: round(value, 4) for name, value in (found._asdict() | means).items()}


def train(asked: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run of TRL's; returns its point."""
    models = asked.folder.resolve() / MODELS
    actor, prompts = str(models / "sft" / "model"), asked.data_root / TRAINING_PROMPTS
    with tempfile.TemporaryDirectory() as folder:
        output, spec = Path(folder) / "actor", Path(folder) / "spec.json"
        batches = prompts_of(prompts, actor, asked.updates, seed, BATCH)
        own = {name: getattr(asked, name) for name in ("rate", "schedule", "kl_coef", "lam", "aggregation")}
        starts = {"reward": "reward", "critic": asked.critic}
        paths = {name: str(models / stage / "model") for name, stage in starts.items()}
        paths |= {"actor": actor, "output": str(output)}
        sizes = {"minibatch": MINIBATCH, "tokens": asked.max_new_tokens}
        spec.write_text(json.dumps({**own, **paths, **sizes, "batches": batches, "seed": seed}))
        command = [str(asked.python), "-m", "benchmarks.learning.trl_worker", str(spec)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        facts = json.loads(done.stdout.splitlines()[-1])
        point = measured(asked.folder, asked.data_root, output, asked)
    print(json.dumps(point), flush=True)
    times = {name: round(facts[name], 1) for name in ("seconds", "cpu_seconds")}
    episodes = sum(map(len, batches))
    return {"update": asked.updates, "episodes": episodes, "average": None, "trl": facts["trl"], **point, **times}


def ours(asked: argparse.Namespace, seed: int) -> None:
    """Our run with the same seed."""
    command = [sys.executable, "-m", "benchmarks.learning.run", str(asked.folder), "--data_root", str(asked.data_root)]
    command += ["--name", asked.ours, "--seeds", str(seed), "--updates", str(asked.updates)]
    command += ["--samples", str(asked.samples), "--prompts", str(asked.prompts), "--results", str(results(asked))]
    command += asked.arguments or ["--config", "sentiment/trained_critic"]
    command += ["--model.generation.max_new_tokens", str(asked.max_new_tokens), "--trainer.precision", "bf16-mixed"]
    command += ["--model.rewards.aggregation", asked.aggregation]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def results(asked: argparse.Namespace) -> Path:
    """Folder of the results."""
    return Path(asked.results / RESULTS[asked.aggregation]).resolve()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.trl", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="Of the checkpoints.")
    parser.add_argument("--data_root", type=Path, required=True, help="Folder of the film reviews.")
    parser.add_argument("--python", type=Path, required=True, help="Interpreter of TRL's environment.")
    parser.add_argument("--name", required=True, help="Of the result.")
    parser.add_argument(
        "--ours", help="Of our result; by default we do not run. Arguments that are not below are ours."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rate", type=float, default=1e-4, help="Of actor and critic: PPOTrainer has one.")
    parser.add_argument("--schedule", default="constant")
    parser.add_argument("--kl_coef", type=float, default=0.1)
    parser.add_argument("--lam", type=float, default=0.95)
    parser.add_argument(
        "--critic", choices=["reward", "critic"], default="reward", help="The stage that the value model starts from."
    )
    parser.add_argument("--aggregation", choices=RESULTS, default="mean", help="Of the reward model.")
    parser.add_argument("--updates", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--samples", type=int, default=16, help="Responses per held-out prompt.")
    parser.add_argument("--prompts", type=int, default=N_PROMPTS, help="Held-out prompts.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    asked, arguments = parser.parse_known_args(words)
    if arguments and not asked.ours:
        parser.error(f"unrecognized arguments: {' '.join(arguments)}")
    asked.arguments = arguments
    return asked


def main(words: list[str] | None = None) -> None:
    """All seeds that are missing."""
    asked = parse(words)
    torch.set_num_threads(1)
    file = results(asked) / f"{asked.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"name": asked.name, "runs": []}
    for seed in asked.seeds:
        if any(run["seed"] == seed for run in found["runs"]):
            continue
        told = f"TRL, rate {asked.rate:g}, kl_coef {asked.kl_coef:g}, lam {asked.lam:g}, {asked.schedule}"
        if asked.critic != "reward":
            told += f", {asked.critic} as value model"
        facts = {"seed": seed, "commit": commit(), "updates": asked.updates, "arguments": told}
        found["runs"].append(facts | {"points": [train(asked, seed)]})
        file.write_text(json.dumps(found, indent=1) + "\n")
        if asked.ours:
            ours(asked, seed)


if __name__ == "__main__":
    main()
