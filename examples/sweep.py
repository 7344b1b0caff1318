"""Search the settings of a configuration with Optuna: a high score at a low KL.

pip install optuna
lit-ppo fit --config quickstart  # once: the stages before PPO
python sweep.py [TRIALS] [ARGUMENTS of lit-ppo fit]
"""

import csv
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import optuna

from lit_ppo.cli.main import main


def held_out(run: Path) -> tuple[float, float]:
    """Score and KL of the validation at the end."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = rows[-1]
    if not last.get("val/score"):
        raise RuntimeError(f"{run}: no validation after the last update; set trainer.val_check_interval")
    return float(last["val/score"]), float(last["val/kl"])


def run_trial(trial: optuna.Trial, arguments: Sequence[str], folder: Path) -> tuple[float, float]:
    """One run of the command with settings that Optuna suggests."""
    settings = {
        "model.actor_optimizer.lr": trial.suggest_float("lr", 1e-4, 2e-3, log=True),
        "model.kl_coef": trial.suggest_float("kl_coef", 0.1, 2.0, log=True),
        "model.advantages.lam": trial.suggest_float("lam", 0.5, 1.0),
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": folder,
        "trainer.logger.name": "",
        "trainer.logger.version": f"trial_{trial.number}",
    }
    words = ["fit", *arguments]
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    if main(words) != 0:
        raise optuna.TrialPruned  # the run has said why
    return held_out(folder / f"trial_{trial.number}")


def sweep(trials: int, arguments: Sequence[str], folder: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials that no other beats in both score and KL; a second call goes on from the file."""
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{folder}/sweep.db",
        study_name="sweep",
        load_if_exists=True,
        directions=["maximize", "minimize"],
    )
    study.optimize(partial(run_trial, arguments=arguments, folder=folder), n_trials=trials)
    return sorted(study.best_trials, key=lambda trial: trial.values[1])


if __name__ == "__main__":
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for best in sweep(n, sys.argv[2:] or ["--config", "quickstart"], Path("runs/sweep")):
        print(f"score {best.values[0]:.2f} at {best.values[1]:.2f} nats: {best.params}")
