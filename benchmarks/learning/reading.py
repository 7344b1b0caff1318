"""What the reward model's score depends on: ``python -m benchmarks.learning.reading FOLDER --data_root DIR``.

For each way to read the reward model (``aggregation``), on responses of the reference: how much of the full response's
score its first tokens already tell, and how well the score agrees with the judge.
"""

import argparse
import json
from copy import copy
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from benchmarks.learning.run import commit
from benchmarks.learning.task import RESULTS, make_reference, make_scorer, training_prompts

Aggregation = Literal["last", "mean"]


def share(first: np.ndarray, second: np.ndarray) -> float:
    """Squared correlation: the share of the variance of one that a line through the other explains.

    >>> round(share(np.array([0.0, 1.0, 2.0]), np.array([1.0, 0.0, 3.0])), 3)
    0.429
    """
    return float(np.corrcoef(first, second)[0, 1] ** 2)


def first_tokens(experience: Any, tokenizer: Any, n: int) -> Any:
    """The same responses, cut to their first tokens."""
    shorter = copy(experience)
    rows = zip(experience.response_ids[:, :n].tolist(), experience.response_mask[:, :n].tolist(), strict=True)
    kept = [[token for token, is_response in zip(*row, strict=True) if is_response] for row in rows]
    shorter.responses = tokenizer.batch_decode(kept, skip_special_tokens=True)
    return shorter


def reading(experience: Any, tokenizer: Any, score: Any, judge: Any) -> dict[str, Any]:
    """Of one way to score.

    Args:
        experience: Responses.
        tokenizer: That made them.
        score: Scores an experience.
        judge: Scores an experience, too.
    """
    longest = experience.response_mask.shape[1]
    full = score(experience).double().numpy()
    told = {}
    for n in sorted({longest // 4, longest // 2, longest * 3 // 4, longest - 1}):
        told[n] = share(score(first_tokens(experience, tokenizer, n)).double().numpy(), full)
    agreement = np.corrcoef(full, judge(experience).double().numpy())[0, 1]
    return {"told_by_first_tokens": told, "correlation_with_judge": float(agreement), "deviation": float(full.std())}


def main() -> None:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.reading", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--responses", type=int, default=2048)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    module, judge = make_reference(asked.folder, asked.max_new_tokens), make_scorer(asked.folder, "judge")
    prompts = training_prompts(asked.data_root, asked.responses)
    experience = module.rollout(prompts, samples_per_prompt=1, logprobs=False, stream="reading")
    found: dict[str, Any] = {"commit": commit(), "responses": len(experience)}
    for aggregation in get_args(Aggregation):
        score = make_scorer(asked.folder, "reward", aggregation)
        found[aggregation] = reading(experience, module.tokenizer, score, judge)
    asked.results.mkdir(parents=True, exist_ok=True)
    (asked.results / "reading.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
