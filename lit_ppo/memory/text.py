"""An estimate as text."""

from typing import Any

from lit_ppo.memory.estimate import ACTOR, CHECKPOINT, CRITIC, HELD, HOST, ROLLOUT, SCORE, Estimate
from lit_ppo.memory.job import Job, MicroBatch

TITLES = {
    HELD: "Held from the first update on",
    ROLLOUT: "Rollout, on top of that",
    SCORE: "Scoring, on top of what is held",
    ACTOR: "Update of the actor, on top of what is held",
    CRITIC: "Update of the critic, on top of what is held",
    CHECKPOINT: "Checkpoint, on top of what is held",
    HOST: "In CPU memory",
}
STRATEGIES = {"single": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}
LEFT_OUT = (
    "Not counted: the process itself and its libraries, what a GPU's driver and allocator add, what the operating "
    "system caches, loading, validation, callbacks. Computed, not measured: nothing was loaded but config.json."
)


def table(found: Estimate, module: Any, job: Job, notes: list[str]) -> str:
    """What a person reads.

    Args:
        found: The estimate.
        module: The LitPPO.
        job: Data and Trainer.
        notes: What was assumed.
    """
    micro = MicroBatch.of(module, job)
    many = f"{job.n_processes} processes, {STRATEGIES[job.strategy]}" if job.n_processes > 1 else "one process"
    rows = [
        f"Memory of each process ({many}, {job.precision})",
        f"{job.batch_size} prompts x {module.samples_per_prompt} responses an update, up to {job.prompt_tokens} + "
        f"{micro.new} tokens each; micro-batches of {micro.sizes}",
    ]
    rows += [f"Note: {note}" for note in notes]
    width = max(len(line.name) for line in found.lines) + 2
    for phase, title in TITLES.items():
        lines = [line for line in found.lines if line.phase == phase]
        if not lines:
            continue
        rows.append(f"\n{title}")
        rows += [f"  {line.name:{width}}{size(line.n_bytes):>10}   {line.assumes}" for line in lines]
        if phase != HOST:
            rows.append(f"  {'= in all':{width}}{size(found.sum(phase)):>10}")
    counted = [line for line in found.lines if line.phase in (HELD, found.largest)]
    first, second = sorted(counted, key=lambda line: -line.n_bytes)[:2]
    rows.append(f"\nLargest phase: {found.largest}, {size(found.peak)} in each process.")
    for line in (first, second):
        share = f"{line.n_bytes / found.peak:.0%}"
        rows.append(f"  {line.name}: {size(line.n_bytes)} ({share})" + (f"; lower it: {line.lower}" * bool(line.lower)))
    rows.append(f"\n{LEFT_OUT}")
    return "\n".join(rows)


def size(n_bytes: float) -> str:
    """A number of bytes.

    >>> size(3 * 2**30), size(5 * 2**20)
    ('3.00 GiB', '5.0 MiB')
    """
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 0.1 * 2**30 else f"{n_bytes / 2**20:.1f} MiB"
