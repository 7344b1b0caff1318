"""A small grid for each side, of one size: one setting after another is tried, and the fastest kept."""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.jobs import Job

# glibc returns large blocks to the system when they are freed, and a page asked for again has to be zeroed again
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_ARENA_MAX": "1"}


def grid(side: str, job: Job) -> dict[str, list[Any]]:
    """Values to try for each setting, the first first.

    Args:
        side: ``"ours"`` or ``"trl"``.
        job: Bounds what makes sense.
    """
    row = job.longest_prompt + job.longest_response
    rows = [job.minibatch_size // part for part in (1, 2, 4) if job.minibatch_size >= part]
    common: dict[str, list[Any]] = {"environment": [{}, KEEP_MEMORY], "attention": ["sdpa", "eager"]}
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
    """Try the grid, one setting after another; the fastest point is the smallest of what is yielded.

    Args:
        values: What to try for each setting.
        seconds: Runs a point.
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
