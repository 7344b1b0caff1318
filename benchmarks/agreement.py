"""Check that both sides compute the same numbers from the same tokens, before their times are compared."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.jobs import Job
from benchmarks.runner import Runner

TOLERANCE = 1e-5
# after one step of Adam, which makes the same step for a gradient that is only rounding noise
STEP_TOLERANCE = 1e-4
ROWS = 8
ROLLOUT = ("logprobs", "ref_logprobs", "values")
UPDATE = ("advantages", "policy_loss", "value_loss", "policy_loss_after_a_step", "value_loss_after_a_step")


def whole_batches(job: Job) -> Job:
    """A few rows of the job, all in each of two optimizer steps.

    The second pass has what the first lacks: a ratio other than 1 and the effect of a step.
    """
    return replace(job, prompts=min(ROWS, job.prompts), epochs=2, minibatches=1)


def largest_differences(ours: dict[str, Any], theirs: dict[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    """The largest difference of each number over response tokens.

    Raises:
        ValueError: The sides have sampled different tokens.
    """
    mask = ours["response_mask"].astype(bool)
    width = mask.shape[1]
    if not np.array_equal(ours["response_ids"][mask], theirs["response_ids"][:, :width][mask]):
        raise ValueError("the sides have sampled different tokens")
    differences = {}
    for name in names:
        a, b = np.asarray(ours[name]), np.asarray(theirs[name])
        a, b = (a, b) if a.shape != mask.shape else (a[mask], b[:, :width][mask])
        differences[name] = float(np.abs(a - b).max())
    return differences


def check(runner: Runner, job: Job) -> dict[str, Any]:
    """Run both sides for one update on the same tokens.

    Rollout numbers are compared on the job's own responses. Advantages and losses are compared where all responses
    have the longest length: with shorter ones TRL puts the score one token after the last, and its value loss has
    that token too.

    Returns:
        The largest differences, and whether all keep to the tolerance.
    """
    differences: dict[str, float] = {}
    for shape, names in ((whole_batches(job), ROLLOUT), (whole_batches(job.full()), UPDATE)):
        with runner.job_files(shape) as folder:
            sides = [_by_step(_captured(runner, side, folder)) for side in ("ours", "trl")]
        differences |= largest_differences(*sides, names)
    agrees = all(
        difference <= (STEP_TOLERANCE if name.endswith("step") else TOLERANCE)
        for name, difference in differences.items()
    )
    return {"largest_difference": differences, "agrees": agrees}


def _by_step(arrays: dict[str, Any]) -> dict[str, Any]:
    """The losses of both passes under names of their own."""
    losses = {name: np.atleast_1d(arrays[name]) for name in ("policy_loss", "value_loss")}
    return (
        arrays
        | {name: values[0] for name, values in losses.items()}
        | {f"{name}_after_a_step": values[-1] for name, values in losses.items()}
    )


def _captured(runner: Runner, side: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{side}.npz"
    # no limit that would split a step into several forwards
    settings = {"micro_batch_tokens": 1 << 30} if side == "ours" else {"per_device": ROWS}
    runner.run(side, folder, settings, capture=path)
    with np.load(path) as arrays:
        return dict(arrays)
