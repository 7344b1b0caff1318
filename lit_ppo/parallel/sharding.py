"""Shard models over ranks, and gather them.

Without a strategy that shards, the functions here leave models as they are.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lit_ppo.parallel.ranks import rank
from lit_ppo.shown import reason

M = TypeVar("M", bound=nn.Module)


def shards(strategy: Any) -> bool:
    """Whether a Trainer's strategy shards weights."""
    return hasattr(strategy, "shard")


def build(strategy: Any, make: Callable[[], M]) -> M:
    """Build a model on every rank, or on rank 0 alone if the strategy shards.

    The other ranks then get the same model on the meta device, without weights, until :func:`shard` sends each rank
    its shard: only rank 0 ever holds a full copy.

    Args:
        strategy: The Trainer's strategy; None without a Trainer.
        make: Builds the model.

    Raises:
        RuntimeError: Rank 0 failed; includes its message.
    """
    if not shards(strategy):
        return make()
    made: M | None = None
    failure: Exception | None = None
    sent: list[Any] = [None]
    if rank() == 0:
        try:
            made = make()
            sent = [_without_weights(made)]
        except Exception as error:
            failure, sent = error, [reason(error, 2000)]
    dist.broadcast_object_list(sent)
    if failure is not None:
        raise failure
    if isinstance(sent[0], str):
        raise RuntimeError(f"rank 0 failed: {sent[0]}")
    return made if made is not None else cast(M, pickle.loads(sent[0]))


def shard(strategy: Any, model: M, *, frozen: bool = False) -> M:
    """Shard a model that :func:`build` made: each block is one unit, and all other weights are one more.

    Args:
        strategy: The Trainer's strategy; None without a Trainer.
        model: The module whose forward is called; its attribute ``exact`` names parts that compute in float32.
        frozen: The model is not trained.
    """
    if not shards(strategy):
        return model
    exact = [getattr(model, name) for name in getattr(model, "exact", ())]
    model.sharded = True  # type: ignore[assignment]
    for module in [*exact, *blocks(model), model]:
        _receive(module, strategy.root_device)
        strategy.shard(module, frozen=frozen, exact=module in exact)
    return model


def check_placed(strategy: Any, module: nn.Module) -> None:
    """Check that the models which a module already has fit the strategy.

    Raises:
        ValueError: The models are sharded and the strategy does not shard, or the other way round.
    """
    if shards(strategy) != is_sharded(module):
        how = "unsharded, and this strategy shards" if shards(strategy) else "sharded, and this strategy does not shard"
        raise ValueError(
            f"Trainer(strategy={type(strategy).__name__}): the models of this {type(module).__name__} were already "
            f"built {how}; create a new {type(module).__name__}"
        )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a Hugging Face model that must not be split, inner ones first."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in reversed(list(model.modules())) if type(module).__name__ in names]


def is_sharded(module: nn.Module) -> bool:
    """Whether any part of a module is sharded."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextmanager
def gathered(model: nn.Module | None) -> Iterator[None]:
    """Every rank holds the full model inside this context, and may run any number of forwards without gradients.

    Entering it is collective.

    Args:
        model: What :func:`shard` returned; None gathers nothing.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)] if model is not None else []
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def without_gradient_sync(strategy: Any) -> AbstractContextManager[None]:
    """Backward passes in this context accumulate local gradients; the next one after it reduces their sum.

    Args:
        strategy: The Trainer's strategy.
    """
    block: Callable[[], AbstractContextManager[None]] = getattr(strategy, "block_backward_sync", nullcontext)
    return block()


def _without_weights(model: nn.Module) -> bytes:
    """A pickled copy whose parameters and buffers are on the meta device.

    Raises:
        ValueError: The model's code comes from the hub, so the other ranks do not have it.
    """
    fetched = [
        type(part).__name__ for part in model.modules() if type(part).__module__.startswith("transformers_modul")
    ]
    if fetched:
        raise ValueError(f"{fetched[0]}: models with remote code (trust_remote_code) cannot be sharded; use 'ddp'")
    hollow: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        hollow[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        hollow[id(buffer)] = torch.empty_like(buffer, device="meta")
    return pickle.dumps(copy.deepcopy(model, hollow))


@torch.no_grad()
def _receive(module: nn.Module, device: torch.device) -> None:
    """Replace this rank's parameters and buffers with those of rank 0, except those that are already sharded."""
    received: dict[Tensor, Tensor] = {}  # by the tensor that they replace, so that tied weights stay tied
    done = {inner for part in module.modules() if isinstance(part, FSDPModule) for inner in part.modules()}
    for part in module.modules():
        if part in done:
            continue
        both: list[Any] = [part._parameters, part._buffers]
        for tensors in both:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in received:
                    full = tensor.to(device) if rank() == 0 else torch.empty_like(tensor, device=device)
                    full = full.detach().contiguous()
                    dist.broadcast(full.view(torch.uint8) if full.dtype == torch.bool else full, src=0)
                    if isinstance(tensor, nn.Parameter):
                        full = nn.Parameter(full, requires_grad=tensor.requires_grad)
                    received[tensor] = full
                tensors[name] = received[tensor]
