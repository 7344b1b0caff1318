"""Out of memory: which argument to change, and by how much."""

import re
from math import ceil
from typing import Any, NamedTuple

import torch

from lit_ppo.device import is_out_of_memory
from lit_ppo.memory.resident import Resident, full_gradients, job_of_module, unsharded
from lit_ppo.memory.text import size
from lit_ppo.shown import first_line, shortened

MARGIN = 0.9  # of the memory that is there; the peak may lie above the point where it ended
UNITS = {"bytes": 1, "KB": 2**10, "KiB": 2**10, "MB": 2**20, "MiB": 2**20, "GB": 2**30, "GiB": 2**30}
AMOUNT = r"([\d.]+) (bytes|[KMG]i?B)"
TRIED = re.compile(rf"[Tt]ried to allocate {AMOUNT}")


class Report(NamedTuple):
    """What PyTorch says when memory ends, in bytes."""

    usable: int  # by tensors: allocated, free, or kept by the allocator
    wanted: int  # allocated, and the tensor that did not fit

    @classmethod
    def of(cls, text: str) -> "Report | None":
        """Read the message of CUDA's allocator or of MPS; None if it has no numbers."""

        def amount(before: str, after: str = "") -> int | None:
            found = re.search(before + AMOUNT + after, text)
            return None if found is None else int(float(found[1]) * UNITS[found[2]])

        tried, free = amount("[Tt]ried to allocate "), amount("of which ", " is free")
        allocated = amount("Of the allocated memory ", " is allocated by PyTorch")
        kept = amount("", " is reserved by PyTorch but unallocated")
        if tried is not None and free is not None and allocated is not None:
            return cls(allocated + free + (kept or 0), allocated + tried)
        allocated, most = amount(r"MPS allocated: "), amount("max allowed: ")
        other = amount("other allocations: ")
        if tried is not None and allocated is not None and most is not None:
            return cls(most - (other or 0), allocated + tried)
        return None


class Shortage(NamedTuple):
    """How far memory did not reach, in bytes."""

    left: int  # of the device, beside all that does not depend on the size of a batch
    needed: int  # by the batch, at least
    held: int  # what does not depend on the size of a batch
    usable: int

    @property
    def share(self) -> float:
        """Of the batch that fits."""
        return min(0.5, MARGIN * self.left / max(self.needed, 1))


def explain_memory(module: Any, error: RuntimeError, phase: str, detail: str, taken: int = 0) -> None:
    """Say which argument to lower, and to what, if an error is one of memory.

    Args:
        module: The LitPPO.
        error: Of an update.
        phase: Where it was raised: rollout, score or update.
        detail: Of the phase, as on the progress bar.
        taken: Bytes that were reserved for optimizer states.

    Raises:
        torch.OutOfMemoryError: Names the argument.
    """
    if not is_out_of_memory(error):
        return
    found = TRIED.search(text := str(error))
    reason = first_line(error) if found is None else shortened(text[: found.end()], 200)
    if phase == "score":
        advice = "RewardModel(batch_size): out of memory in scoring; halve it, or give batch_tokens"
        raise torch.OutOfMemoryError(f"{advice} ({reason})") from error
    sampling = phase == "rollout" and detail != "log-probs"
    shortage = _shortage(module, text, taken, sampling=sampling)
    if shortage is not None and shortage.left < 0.05 * shortage.usable:
        raise torch.OutOfMemoryError(f"{_too_large(module, phase, shortage)} ({reason})") from error
    kind, limits = ("rollout", module.rollout_limits) if sampling else ("micro", module.limits)
    tokens = limits["micro_batch_tokens"]
    name, value = f"{kind}_batch_{'tokens' if tokens else 'size'}", tokens or limits["micro_batch_size"]
    less = _less(module, value, shortage, by_tokens=bool(tokens), sampling=sampling)
    change = f"set it to {less} or less, which changes only rounding" if less else "a response alone does not fit"
    need = ""
    if shortage is not None:
        need = f", which needs at least {size(shortage.needed)} where {size(shortage.left)} are left for it"
    raise torch.OutOfMemoryError(
        f"{module.model_settings.owner}({name}={value}): out of memory in the {phase}{need}; {change}; or try "
        f"{', '.join(_others(module, sampling=sampling))} ({reason})"
    ) from error


def _shortage(module: Any, text: str, taken: int, *, sampling: bool) -> Shortage | None:
    report = Report.of(text)
    if report is None:
        return None
    ours, gathered = Resident.of(module), unsharded(module, sampling=sampling)
    now = ours.weights + ours.gradients + ours.states + taken + gathered
    held = ours.weights + ours.states + ours.missing_states + (0 if sampling else ours.all_gradients) + gathered
    return Shortage(max(report.usable - held, 0), max(report.wanted - now, 0), held, report.usable)


def _less(module: Any, value: int | None, shortage: Shortage | None, *, by_tokens: bool, sampling: bool) -> int | None:
    """The largest value that may fit; None if the smallest one that makes sense does not."""
    data = getattr(module.trainer, "datamodule", None)
    if value is None:
        rows = getattr(data, "batch_size", None) if sampling else None
        rows = module.minibatch_size if rows is None else rows * module.samples_per_prompt
        value = ceil(rows / module.trainer.world_size)
    least = 1
    if by_tokens:
        longest = max(getattr(data, "prompt_lengths", None) or {1})
        least = longest + int(module.generation.max_new_tokens)
    less = int(value * (0.5 if shortage is None else shortage.share))
    step = 1024 if less >= 2048 else 1
    return max(less // step * step, least) if value > least else None


def _others(module: Any, *, sampling: bool) -> list[str]:
    """Other changes that lower what this run needs."""
    settings, job = module.model_settings, job_of_module(module)
    others = ["a shorter max_new_tokens"] if sampling else []
    if not sampling and not settings.activation_checkpointing:
        others.append("activation_checkpointing=True")
    if module.trainer.precision == "32-true" and job.gathered is None and job.on_gpu:
        others.append("Trainer(precision='bf16-mixed')")
    full = 0 if sampling else full_gradients(module, job)
    if full:
        others.append(f"FSDP2Strategy(sync_every_micro_batch=True) (saves up to {size(full)})")
    if settings.actor_lora is None:
        ours = Resident.of(module)
        saved = ours.states + ours.missing_states + (0 if sampling else ours.all_gradients)
        others.append(f"actor_lora and critic_lora (save up to {size(saved)})")
    if job.n_shards == 1:
        others.append("strategy='fsdp2' on several devices")
    return others


def _too_large(module: Any, phase: str, shortage: Shortage) -> str:
    """The message where no batch size helps."""
    job = job_of_module(module)
    devices = ceil(shortage.held * job.n_shards / (0.7 * shortage.usable))
    lora = "" if module.model_settings.actor_lora is not None else "train adapters (actor_lora, critic_lora), or "
    return (
        f"{module.model_settings.owner}: out of memory in the {phase}: weights, gradients and optimizer states take "
        f"{size(shortage.held)} of {size(shortage.usable)}, so no batch size helps; {lora}use strategy='fsdp2' on at "
        f"least {max(devices, job.n_shards + 1)} devices"
    )
