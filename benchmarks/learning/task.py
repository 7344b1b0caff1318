"""The film-review task: its files, the held-out prompts, and what is measured of a policy on them."""

import gzip
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from lit_ppo import LitPPO, Reinforce, RewardModel
from lit_ppo.ppo.text_loss import exact_kl

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "learning"
MODELS = Path("runs/sentiment")
PROMPTS, TRAINING_PROMPTS = "imdb_prompts_eval.jsonl.gz", "imdb_prompts_train.jsonl.gz"
N_PROMPTS = 64
NEW_TOKENS = 48
ROWS = 64  # of one forward


class Measured(NamedTuple):
    """Of one policy on the held-out prompts.

    Args:
        score: Mean of the training reward.
        judge: Mean of the judge's score.
        kl: Mean over responses of the exact KL of every token's distribution, summed over the response, nats.
        length: Mean tokens of a response.
        error: Standard error of the score over prompts, given the prompts.
    """

    score: float
    judge: float
    kl: float
    length: float
    error: float


def held_out_prompts(data_root: Path, n: int = N_PROMPTS) -> list[str]:
    """The first held-out prompts."""
    return _first(data_root / PROMPTS, n)


def training_prompts(data_root: Path, n: int) -> list[str]:
    """The first prompts that runs train on."""
    return _first(data_root / TRAINING_PROMPTS, n)


def _first(file: Path, n: int) -> list[str]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line, _ in zip(lines, range(n), strict=False)]


def make_scorer(folder: Path, stage: str, aggregation: Literal["last", "mean"] = "last") -> RewardModel:
    """The reward model (``reward``), or that of other data, which no run trains on (``judge``)."""
    return RewardModel(str(folder / MODELS / stage / "model"), batch_size=128, aggregation=aggregation)


def make_reference(folder: Path, max_new_tokens: int) -> LitPPO:
    """The SFT model, to sample from."""
    actor, generation = str(folder / MODELS / "sft" / "model"), {"max_new_tokens": max_new_tokens}
    return LitPPO(actor, critic=None, reference=None, advantages=Reinforce(), generation=generation, seed=0)


@torch.no_grad()
def measure(module: Any, judge: Any, prompts: list[str], samples: int) -> Measured:
    """Sample from the actor and measure it; draws no random numbers of training.

    Args:
        module: The LitPPO.
        judge: Scores an experience.
        prompts: Held out.
        samples: Responses per prompt.
    """
    experience = module.rollout(prompts, samples_per_prompt=samples, logprobs=False, stream="held out")
    scores = module.score(experience)
    kls = []
    for start in range(0, len(experience), ROWS):
        rows = list(range(start, min(start + ROWS, len(experience))))
        kls.append(exact_kl(module, experience.select(rows)).sum(1))
    within = scores.view(len(prompts), samples).var(1) if samples > 1 else torch.zeros(len(prompts))
    return Measured(
        score=float(scores.mean()),
        judge=float(judge(experience).mean()),
        kl=float(torch.cat(kls).mean()),
        length=float(experience.response_mask.sum(1).float().mean()),
        error=float((within.mean() / len(scores)).sqrt()),
    )
