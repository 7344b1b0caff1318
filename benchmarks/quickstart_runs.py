"""Runs of the quickstart's PPO stage that go well or wrong in different ways, with gold measures of how they go.

Gold measures come from the grammar's parser, which training does not see.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from lit_ppo import LitPPO, PromptDataModule
from lit_ppo.advantages import GroupRelative, LeaveOneOut
from lit_ppo.callbacks import (
    AdaptiveKL,
    AdvantageNormalization,
    CriticWarmup,
    EntropyBonus,
    KLLoss,
    RewardNormalization,
    ValueClipping,
)
from lit_ppo.quickstart import Parsed, parse
from lit_ppo.quickstart.words import SUBJECTS
from lit_ppo.rewards import RewardModel

RESPONSES = 64  # per update


def adam(rate: float) -> Callable[..., torch.optim.Optimizer]:
    """AdamW with a learning rate."""
    return lambda params: torch.optim.AdamW(params, lr=rate, weight_decay=0.0)


def reviews(prompts: list[str], responses: list[str]) -> list[Parsed | None]:
    """The parsed reviews; None where the grammar cannot have written one."""
    return [parse(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]


def positive(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for a review that the grammar can have written and that is positive, else 0."""
    return [float(review is not None and review.polarity == "positive") for review in reviews(prompts, responses)]


def negative(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for a review that the grammar can have written and that is negative, else 0."""
    return [float(review is not None and review.polarity == "negative") for review in reviews(prompts, responses)]


def readable(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for a review that the grammar can have written, else 0."""
    return [float(review is not None) for review in reviews(prompts, responses)]


def varied(prompts: list[str], responses: list[str]) -> list[float]:
    """As ``positive``, but reviews of one of the grammar's 14 patterns count only up to a quarter of all."""
    patterns = [review.pattern if review else None for review in reviews(prompts, responses)]
    count = Counter(patterns)
    worth = {pattern: min(1.0, len(responses) / 4 / n) for pattern, n in count.items()}
    return [is_good * worth[p] for is_good, p in zip(positive(prompts, responses), patterns, strict=True)]


def brevity(responses: list[str]) -> list[float]:
    """Another task: short responses."""
    return [-len(response) / 20 for response in responses]


class Negative(RewardModel):
    """Another task: bad reviews."""

    def forward(self, experience: Any) -> torch.Tensor:
        return -super().forward(experience)


class Loophole(RewardModel):
    """A reward that can be hacked: it adds 1 for every "and"."""

    def forward(self, experience: Any) -> torch.Tensor:
        scores = super().forward(experience)
        return scores + torch.tensor([float(text.split().count("and")) for text in experience.responses]).to(scores)


def is_film(prompt: str) -> bool:
    """Whether a prompt is about a film, one of five subjects."""
    return any(item in prompt for item in SUBJECTS["film"]["item"])


def by_subject(prompts: list[str], responses: list[str]) -> list[float]:
    """A task that a few prompts do not show: reviews of films should be positive, all others negative."""
    opinions = {"positive": 1.0, "negative": -1.0}
    found = [opinions.get(review.polarity, 0.0) if review else 0.0 for review in reviews(prompts, responses)]
    return [opinion if is_film(prompt) else -opinion for opinion, prompt in zip(found, prompts, strict=True)]


class Run(NamedTuple):
    """A row of the table.

    Args:
        changes: What differs from the quickstart's PPO stage.
        callbacks: In addition to the monitors.
        updates: How many.
        gold: Gold measure.
        prompts: Prompts to train on; None: all.
        of: Which prompts to choose from.
        then: What follows a verdict.
    """

    changes: dict[str, Any] = {}
    callbacks: Callable[[], list[L.Callback]] = lambda: [AdvantageNormalization()]
    updates: int = 40
    gold: Callable[[list[str], list[str]], list[float]] = positive
    prompts: int | None = None
    of: Callable[[str], bool] = lambda prompt: True
    then: str = "warn"


NO_CRITIC: dict[str, Any] = {"critic": None, "samples_per_prompt": 4}
GAMED = Run({"kl_coef": 0.05, "rewards": Loophole, "critic": "actor"}, updates=60)
NARROW = Run({"rewards": by_subject, "critic": "actor"}, gold=by_subject, prompts=16, of=is_film)
COLLAPSING = {
    "no KL, rate 1e-3": Run({"kl_coef": 0.0, "actor_optimizer": adam(1e-3)}),
    "no KL, rate 3e-3": Run({"kl_coef": 0.0, "actor_optimizer": adam(3e-3)}),
    "no KL, rate 1e-2": Run({"kl_coef": 0.0, "actor_optimizer": adam(1e-2)}),
    "one pattern": Run({"kl_coef": 0.05}, updates=80, gold=varied),
}
DECEIVING = {
    "a loophole": GAMED,
    "a loophole, going back": GAMED._replace(then="go_back"),
    "16 films": NARROW,
    "16 films, going back": NARROW._replace(then="go_back"),
}
HEALTHY = {
    "quickstart, seed 1": Run(),
    "quickstart, seed 2": Run(),
    "quickstart, seed 3": Run(),
    "slow": Run({"actor_optimizer": adam(2e-4)}),
    "AdaptiveKL": Run(callbacks=lambda: [AdvantageNormalization(), AdaptiveKL(target=2.5, horizon=2000)]),
    "PPO-max's tricks": Run(
        callbacks=lambda: [
            AdvantageNormalization(),
            RewardNormalization(),
            ValueClipping(),
            CriticWarmup(3),
            EntropyBonus(0.01),
        ]
    ),
    "GRPO": Run(
        {**NO_CRITIC, "advantages": GroupRelative(), "kl_coef": 0.0, "actor_optimizer": adam(3e-4)},
        callbacks=lambda: [KLLoss(coef=0.3)],
    ),
    "RLOO": Run({**NO_CRITIC, "advantages": LeaveOneOut()}),
    "reward: the parser": Run(
        {"rewards": positive, "critic": "actor", "kl_coef": 0.2, "actor_optimizer": adam(3e-4)},
    ),
    "reward: brevity": Run(
        {"rewards": brevity, "critic": "actor", "actor_optimizer": adam(3e-4)},
        gold=readable,
    ),
    "reward: bad reviews": Run({"rewards": Negative, "critic": "actor"}, gold=negative),
}
RUNS = COLLAPSING | DECEIVING | HEALTHY


def make_module(folder: Path, seed: int, **changes: Any) -> LitPPO:
    """The quickstart's PPO stage.

    Args:
        folder: The quickstart's.
        seed: Of the run.
        **changes: Arguments that differ; ``rewards`` may be a kind of reward model.
    """
    arguments = {"kl_coef": 0.6, "critic": "reward", "actor_optimizer": adam(5e-4), "rewards": RewardModel, **changes}
    if isinstance(arguments["rewards"], type):
        arguments["rewards"] = arguments["rewards"](model=str(folder / "reward/model"), batch_size=128)
    return LitPPO(
        str(folder / "sft/model"),
        generation={"max_new_tokens": 32},
        ppo_epochs=2,
        minibatch_size=32,
        critic_optimizer=adam(1e-3),
        seed=seed,
        **arguments,
    )


def make_data(folder: Path, job: Run, rows: int, seed: int, place: Path) -> PromptDataModule:
    """The quickstart's prompts, or the first few of a kind, repeated to fill a batch.

    Args:
        folder: The quickstart's.
        job: The run.
        rows: Prompts of a batch.
        seed: Of the order.
        place: Folder for the file of the few.
    """
    path = folder / "data/prompts.jsonl"
    if job.prompts is not None:
        lines = [line for line in path.read_text().splitlines() if job.of(json.loads(line)["prompt"])][: job.prompts]
        path = place / "prompts.jsonl"
        path.write_text("".join(line + "\n" for line in lines * (rows // len(lines))))
    held_out = str(folder / "data/prompts_eval.jsonl")
    return PromptDataModule(str(path), val_path=held_out, batch_size=rows, seed=seed)
