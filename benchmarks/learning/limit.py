"""Sample the reference many times on held-out prompts: ``python -m benchmarks.learning.limit FOLDER --data_root D``.

Stores scores and judge's scores, (P, N), in ``FOLDER/reference-AGGREGATION.npz``, and the limit and the best-of-n curve
in ``limit.json`` of the results. The gain of every policy is measured from their mean, on the same prompts. Each way
to read the reward model (``--aggregation``) is another score with another limit, and needs a folder of results.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.learning.curves import BETAS, band, best_of_n, tilted
from benchmarks.learning.task import N_PROMPTS, NEW_TOKENS, RESULTS, held_out_prompts, make_reference, make_scorer

CHUNK = 8  # samples per prompt and rollout
BEST_OF = (1, 2, 4, 8, 16, 32)


def sample(
    folder: Path, prompts: list[str], samples: int, max_new_tokens: int, aggregation: Literal["last", "mean"]
) -> dict[str, np.ndarray]:
    """Scores and judge's scores of the reference's responses, (P, N) each."""
    module = make_reference(folder, max_new_tokens)
    chunks = []
    for chunk in range(samples // CHUNK):
        chunks.append(module.rollout(prompts, samples_per_prompt=CHUNK, logprobs=False, stream=f"reference/{chunk}"))
        print(f"{(chunk + 1) * CHUNK} samples a prompt", flush=True)
    found = {}
    for name in ("reward", "judge"):
        model = make_scorer(folder, name, aggregation if name == "reward" else "last")
        scores = [model(experience).view(len(prompts), CHUNK).numpy() for experience in chunks]
        found[name] = np.concatenate(scores, axis=1)
    return found


def summary(scores: np.ndarray, judge: np.ndarray) -> dict[str, Any]:
    """The curves as plain numbers: all that ``report`` needs of the samples."""
    kls = np.round(np.arange(0.25, 6.01, 0.25), 2)
    curve, judged, (low, high) = tilted(scores, BETAS), tilted(scores, BETAS, judge), band(scores, kls)
    half = tilted(scores[:, : scores.shape[1] // 2], BETAS)
    best = {n: (*best_of_n(scores, n), best_of_n(scores, n, judge)[1]) for n in BEST_OF}
    return {
        "prompts": scores.shape[0],
        "samples": scores.shape[1],
        "score": float(scores.mean()),
        "judge": float(judge.mean()),
        "deviation": float(scores.std(1).mean()),
        "limit": [
            {
                "kl": float(kl),
                "gain": curve.at(kl),
                "low": float(low[i]),
                "high": float(high[i]),
                "judge": judged.at(kl),
                "effective_samples": float(np.interp(kl, curve.kl, curve.ess)),
                "gain_from_half": half.at(kl),
            }
            for i, kl in enumerate(kls)
        ],
        "best_of": [{"n": n, "kl": kl, "gain": gain, "judge": by_judge} for n, (kl, gain, by_judge) in best.items()],
    }


def described(found: dict[str, Any]) -> str:
    """The summary as lines."""
    lines = [f"reference: score {found['score']:.3f}, deviation within a prompt {found['deviation']:.3f}"]
    for point in found["limit"][1::2]:
        lines.append(
            "limit at {kl} nats: {gain:.3f} ({low:.3f} to {high:.3f}), judge {judge:.3f}, effective samples "
            "{effective_samples:.1f}, from half the samples {gain_from_half:.3f}".format(**point)
        )
    return "\n".join(lines + ["best of {n}: {gain:.3f} at {kl:.2f} nats".format(**best) for best in found["best_of"]])


def main() -> None:
    """Sample, store, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.limit", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=N_PROMPTS)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--max_new_tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--aggregation", choices=["last", "mean"], default="mean", help="Of the reward model.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    prompts = held_out_prompts(asked.data_root, asked.prompts)
    found = sample(asked.folder, prompts, asked.samples, asked.max_new_tokens, asked.aggregation)
    kept = asked.folder / f"reference-{asked.aggregation}.npz"
    np.savez_compressed(kept, score=found["reward"], judge=found["judge"])
    found_curves = summary(found["reward"], found["judge"])
    asked.results.mkdir(parents=True, exist_ok=True)
    (asked.results / "limit.json").write_text(json.dumps(found_curves, indent=1) + "\n")
    print(described(found_curves))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
