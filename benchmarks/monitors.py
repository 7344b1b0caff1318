"""When ``CollapseMonitor`` speaks: on runs made to collapse, and on healthy ones.

``python -m benchmarks.monitors runs/quickstart [run ...]``, in a folder where the quickstart has been through its
first two stages. The gold measure is the grammar's parser, which the training knows nothing of: the share of responses
that it can read and finds positive. Prints one row a run, and at which update that share has fallen from its best by
half a standard deviation of single responses at the start.
"""

import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_ppo import LitPPO, PromptDataModule
from lit_ppo.advantages import GroupRelative, LeaveOneOut
from lit_ppo.callbacks import (
    AdaptiveKL,
    AdvantageNormalization,
    CollapseMonitor,
    CriticWarmup,
    EntropyBonus,
    KLLoss,
    RewardNormalization,
    ValueClipping,
)
from lit_ppo.quickstart import parse
from lit_ppo.rewards import RewardModel

HEADER = "run | updates | first warning | first alarm | by | gold: start | best | at the warning | end | fallen at"
RESPONSES = 64  # an update


def adam(rate: float) -> Callable[..., torch.optim.Optimizer]:
    """Adam of a rate."""
    return lambda params: torch.optim.AdamW(params, lr=rate, weight_decay=0.0)


def gold(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for a review that the grammar can have written and that is positive, else 0."""
    found = [parse(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]
    return [float(review is not None and review.polarity == "positive") for review in found]


def brevity(responses: list[str]) -> list[float]:
    """Another task: short responses."""
    return [-len(response) / 20 for response in responses]


class Negative(RewardModel):
    """Another task: bad reviews."""

    def forward(self, experience: Any) -> torch.Tensor:
        """The reward model's scores with the other sign."""
        return -super().forward(experience)


NO_CRITIC: dict[str, Any] = {"critic": None, "samples_per_prompt": 4}
# What differs from the quickstart's PPO stage; callbacks beside the monitor; updates.
COLLAPSING: dict[str, tuple[dict[str, Any], Callable[[], list[L.Callback]], int]] = {
    "no KL, rate 1e-3": ({"kl_coef": 0.0, "actor_optimizer": adam(1e-3)}, lambda: [AdvantageNormalization()], 40),
    "no KL, rate 3e-3": ({"kl_coef": 0.0, "actor_optimizer": adam(3e-3)}, lambda: [AdvantageNormalization()], 40),
    "no KL, rate 1e-2": ({"kl_coef": 0.0, "actor_optimizer": adam(1e-2)}, lambda: [AdvantageNormalization()], 40),
    "one pattern": ({"kl_coef": 0.05}, lambda: [AdvantageNormalization()], 80),
}
HEALTHY: dict[str, tuple[dict[str, Any], Callable[[], list[L.Callback]], int]] = {
    "quickstart, seed 1": ({}, lambda: [AdvantageNormalization()], 40),
    "quickstart, seed 2": ({}, lambda: [AdvantageNormalization()], 40),
    "quickstart, seed 3": ({}, lambda: [AdvantageNormalization()], 40),
    "slow": ({"actor_optimizer": adam(2e-4)}, lambda: [AdvantageNormalization()], 40),
    "AdaptiveKL": ({}, lambda: [AdvantageNormalization(), AdaptiveKL(target=2.5, horizon=2000)], 40),
    "PPO-max's tricks": (
        {},
        lambda: [AdvantageNormalization(), RewardNormalization(), ValueClipping(), CriticWarmup(3), EntropyBonus(0.01)],
        40,
    ),
    "GRPO": (
        {**NO_CRITIC, "advantages": GroupRelative(), "kl_coef": 0.0, "actor_optimizer": adam(3e-4)},
        lambda: [KLLoss(coef=0.3)],
        40,
    ),
    "RLOO": ({**NO_CRITIC, "advantages": LeaveOneOut()}, lambda: [AdvantageNormalization()], 40),
    "reward: the parser": (
        {"rewards": gold, "critic": "actor", "kl_coef": 0.2, "actor_optimizer": adam(3e-4)},
        lambda: [AdvantageNormalization()],
        40,
    ),
    "reward: brevity": (
        {"rewards": brevity, "critic": "actor", "actor_optimizer": adam(3e-4)},
        lambda: [AdvantageNormalization()],
        40,
    ),
    "reward: bad reviews": ({"rewards": Negative, "critic": "actor"}, lambda: [AdvantageNormalization()], 40),
}
RUNS = COLLAPSING | HEALTHY


class Watch(L.Callback):
    """Keeps the gold measure of each update, and the monitor's level."""

    def __init__(self) -> None:
        self.gold: list[float] = []
        self.level: list[int] = []

    def on_update_end(self, trainer: L.Trainer, pl_module: Any, experience: Any) -> None:
        """Behind the monitor."""
        scores = gold(experience.prompts, experience.responses)
        self.gold.append(sum(scores) / len(scores))
        self.level.append(int(trainer.callback_metrics["collapse/level"]))

    def fallen(self) -> int | None:
        """The first of two updates in a row that are half a starting standard deviation below the best before them.

        One update's share is of 64 responses, and jumps by a tenth without reason.
        """
        half = 0.5 * (self.gold[0] * (1 - self.gold[0])) ** 0.5
        low = [value < max(self.gold[: i + 1]) - half for i, value in enumerate(self.gold)]
        return first(map(all, pairwise(low)))


def first(found: Any) -> int | None:
    """Number of the first update of which it is true."""
    return next((update for update, true in enumerate(found, start=1) if true), None)


def run(folder: Path, name: str, seed: int, updates: int | None = None, **monitor: Any) -> tuple[Watch, list[str]]:
    """One run: what was watched, and what the monitor said.

    Args:
        folder: The quickstart's.
        name: One of ``RUNS``.
        seed: Of the run.
        updates: How many, if not those of the table.
        **monitor: Arguments of the monitor.
    """
    changes, callbacks, default = RUNS[name]
    arguments = {"kl_coef": 0.6, "critic": "reward", "actor_optimizer": adam(5e-4), "rewards": RewardModel, **changes}
    if isinstance(arguments["rewards"], type):
        arguments["rewards"] = arguments["rewards"](model=str(folder / "reward/model"), batch_size=128)
    module = LitPPO(
        str(folder / "sft/model"),
        generation={"max_new_tokens": 32},
        ppo_epochs=2,
        minibatch_size=32,
        critic_optimizer=adam(1e-3),
        seed=seed,
        **arguments,
    )
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=updates or default,
        max_epochs=-1,
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[*callbacks(), CollapseMonitor(**monitor), watch],
    )
    batch_size = RESPONSES // arguments.get("samples_per_prompt", 1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, PromptDataModule(str(folder / "data/prompts.jsonl"), batch_size=batch_size, seed=seed))
    return watch, [str(warning.message) for warning in said if "CollapseMonitor" in str(warning.message)]


def row(name: str, watch: Watch, said: list[str]) -> str:
    """A line of the table."""
    warned, alarmed = (first(level >= bound for level in watch.level) for bound in (1, 2))
    by = said[0].split("(")[-1].split(" is at")[0] if said else None
    then = None if warned is None else watch.gold[warned - 1]
    best, fallen = max(watch.gold), watch.fallen()
    cells = [name, len(watch.gold), warned, alarmed, by, watch.gold[0], best, then, watch.gold[-1], fallen]
    return " | ".join(
        "-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells
    )


if __name__ == "__main__":
    print(HEADER, flush=True)
    names = list(RUNS)
    for chosen in sys.argv[2:] or names:
        print(row(chosen, *run(Path(sys.argv[1]), chosen, seed=100 + names.index(chosen))), flush=True)
