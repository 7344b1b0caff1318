"""LitPPO's first update, of which much is known by hand: values and KL are 0, so that returns hang on scores alone."""

from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import pytest

from tests.helpers.recorder import record
from tests.helpers.toys import logged

LAMBDA = 0.95
ENDS = [1, 5, 9, 30, 33]  # tokens


def letters(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """How long a response is written out: a reward that differs from row to row."""
    return [len(response) / 10 for response in responses]


def first_update(folder: Path, actor: Path, *tricks: L.Callback, **overrides: Any) -> tuple[Any, dict[str, float]]:
    """Train for one update: its experience, and what was logged of it.

    Args:
        folder: Where the prompts are written.
        actor: The actor's folder.
        *tricks: Callbacks.
        **overrides: Arguments of LitPPO; some responses end by themselves, the score is :func:`letters`.
    """
    generation = {"max_new_tokens": 8, "eos_token_id": ENDS}
    arguments = {"rewards": letters, "generation": generation, **overrides}
    module, recorder, trainer = record(folder, actor, *tricks, max_steps=1, **arguments)
    (experience,) = recorder.experiences
    (row,) = logged(trainer)
    assert row["value/mean"] == row["objective/kl"] == 0.0
    assert row["objective/score"] == pytest.approx(experience.raw_scores.mean().item())
    assert experience.raw_scores.tolist() == pytest.approx(module.score(experience).tolist())
    return experience, row


def return_mean(experience: Any, scores: list[float]) -> float:
    """What ``value/return_mean`` is where these scores end the responses: k tokens earlier, 0.95^k of them is left."""
    lengths = experience.response_mask.sum(1).tolist()
    return fmean(score * LAMBDA**k for n, score in zip(lengths, scores, strict=True) for k in range(n))
