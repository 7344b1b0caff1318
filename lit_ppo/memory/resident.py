"""What a built LitPPO holds on its device, and room for what it will hold after its first optimizer step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_ppo.memory.job import Job, Strategy, full_bytes, gathered_bytes
from lit_ppo.memory.optimizers import StateSizes
from lit_ppo.parallel.ranks import n_ranks
from lit_ppo.parallel.sharding import shards

LIMITED = ("cuda",)  # kinds of devices whose memory ends where a computer only gets slow


@dataclass(frozen=True)
class Resident:
    """Bytes of this rank."""

    weights: int
    gradients: int  # that exist
    states: int  # of optimizers, that exist
    all_gradients: int  # once there has been a backward of each model
    missing_states: int  # which the first step of each optimizer will make, if that can be counted

    @classmethod
    def of(cls, module: Any) -> "Resident":
        """What a LitPPO holds, once a Trainer has built its models and optimizers."""
        optimizers = module.optimizers(use_pl_optimizer=False)
        trained: list[Tensor] = []
        states: list[Tensor] = []
        missing = 0
        for name, optimizer in zip(("actor", "critic"), optimizers if isinstance(optimizers, list) else [optimizers],
                                   strict=False):  # fmt: skip
            if name == "critic" and module.critic_frozen:
                continue
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            new = [_local(p) for p in parameters if not optimizer.state.get(p)]
            with suppress(RuntimeError, ValueError, TypeError, AssertionError):  # some step on GPUs only
                missing += StateSizes(module.factories[name][0]).n_bytes(new)
            states += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
            trained += parameters
        return cls(
            weights=n_bytes(module.parameters()),
            gradients=n_bytes(p.grad for p in trained if p.grad is not None),
            states=n_bytes(states),
            all_gradients=n_bytes(trained),
            missing_states=missing,
        )


@contextmanager
def reserved(module: Any) -> Iterator[int]:
    """Inside this context memory is taken as if each optimizer had made a step, on devices where it is short.

    Yields:
        The bytes that are taken.
    """
    size = Resident.of(module).missing_states if module.device.type in LIMITED else 0
    buffer = torch.empty(size, dtype=torch.uint8, device=module.device)
    try:
        yield size
    finally:
        del buffer
        if module.device.type == "cuda":
            torch.cuda.empty_cache()  # states are of other sizes


def job_of_module(module: Any) -> Job:
    """How a built module computes; sizes of its data are left out."""
    strategy = module.trainer.strategy
    kind: Strategy = "fsdp2" if shards(strategy) else "ddp" if n_ranks() > 1 else "single"
    policy = getattr(strategy, "mixed_precision", None)
    return Job(
        batch_size=1, prompt_tokens=1, precision=module.trainer.precision, n_processes=n_ranks(), strategy=kind,
        gathered=getattr(policy, "param_dtype", None), on_gpu=module.device.type == "cuda",
        every_micro_batch=bool(getattr(strategy, "sync_every_micro_batch", False)),
    )  # fmt: skip


def unsharded(module: Any, *, sampling: bool) -> int:
    """Bytes of gathered weights and of full gradients, in which the size of a batch plays no part."""
    job = job_of_module(module)
    if job.n_shards == 1:
        return 0
    if sampling:
        return full_bytes(module.actor, job)
    models: list[nn.Module] = [model for model in (module.actor, module.critic) if model is not None]
    return max(gathered_bytes(model, job.computing) for model in models) + full_gradients(module, job)


def full_gradients(module: Any, job: Job) -> int:
    """Bytes of the gradients that FSDP2 keeps between micro-batches, of one model at a time."""
    if job.n_shards == 1 or job.every_micro_batch:
        return 0
    models: list[nn.Module] = [model for model in (module.actor, module.critic) if model is not None]
    return max(4 * sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models)


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Of this rank's parts of tensors; each one counts once."""
    return sum(x.numel() * x.element_size() for x in map(_local, dict.fromkeys(tensors)))


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
