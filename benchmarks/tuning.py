"""A small grid of equal size for each side: try one setting after another and keep the fastest."""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.jobs import Job
from lit_ppo.environment import MEMORY


def grid(side: str, job: Job) -> dict[str, list[Any]]:
    """Values to try for each setting, in this order.

    Args:
        side: ``"ours"`` or ``"trl"``.
        job: Limits the values.
    """
    row = job.longest_prompt + job.longest_response
    rows = [job.minibatch_size // part for part in (1, 2, 4) if job.minibatch_size >= part]
    common: dict[str, list[Any]] = {"environment": [{}, MEMORY], "attention": ["sdpa", "eager"]}
    if side == "ours":
        return {
            "micro_batch_tokens": [4096, *(n * row for n in rows[1:])],
            **common,
            "reward_batch": [32, 8],
        }
    return {
        "per_device": rows,
        **common,
        "rollout_batch": [64, max(1, job.prompts // 4)],
        "checkpointing": [False],
    }


def tune(
    values: dict[str, list[Any]], seconds: Callable[[dict[str, Any]], float]
) -> Iterator[tuple[dict[str, Any], float]]:
    """Try the grid, one setting after another, and yield each point with its seconds.

    Args:
        values: What to try for each setting.
        seconds: Runs a point and returns its seconds.
    """
    best = {name: tried[0] for name, tried in values.items()}
    fastest = seconds(best)
    yield best, fastest
    for name, tried in values.items():
        for value in tried[1:]:
            point = best | {name: value}
            taken = seconds(point)
            yield point, taken
            if taken < fastest:
                best, fastest = point, taken
