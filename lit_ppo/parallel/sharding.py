"""Shard models over ranks, and gather them.

Without a strategy that shards, the functions here leave models as they are.
"""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

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


def exact_parts(model: nn.Module) -> set[nn.Module]:
    """The modules inside the parts that ``exact`` names: they compute in float32 under autocast, too."""
    named = [getattr(part, name) for part in model.modules() for name in getattr(part, "exact", ())]
    return {inner for part in named for inner in part.modules()}


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that autocast computes in its dtype, and whose weights nothing else reads.

    Left out are layers that share the embeddings' weight, those in parts that ``exact`` names, and those with DoRA.
    """
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    dora = [part for part in model.modules() if len(getattr(part, "lora_magnitude_vector", ()))]
    others = exact_parts(model) | {inner for part in dora for inner in part.modules()}
    linear = [part for part in model.modules() if isinstance(part, nn.Linear | Conv1D) and part not in others]
    return [part for part in linear if id(part.weight) not in embeddings]


@contextmanager
def gathered(model: nn.Module | None) -> Iterator[None]:
    """Every rank holds the full model inside this context, and may run any number of forwards without gradients.

    Under autocast, weights that it would cast are cast before they are sent. Entering the context is collective.

    Args:
        model: What :func:`shard` returned; None gathers nothing.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)] if model is not None else []
    kind = next(
        (p.device_mesh.device_type for part in parts for p in part.parameters() if isinstance(p, DTensor)), None
    )
    if model is not None and kind is not None and torch.is_autocast_enabled(kind):
        with _cast_and_gathered(model, parts, kind):
            yield
        return
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


@contextmanager
def _cast_and_gathered(model: nn.Module, parts: Sequence[nn.Module], kind: str) -> Iterator[None]:
    """As :func:`gathered`, with the weights of linear layers in autocast's dtype.

    FSDP2 gathers all weights of a unit in one dtype. So they are gathered here, and its hooks rest meanwhile.
    """
    dtype = torch.get_autocast_dtype(kind)
    cast = {p for layer in linear_layers(model) for p in layer.parameters(recurse=False) if p.dtype == torch.float32}
    named = [(module, name, p) for module in model.modules() for name, p in module._parameters.items()]
    sharded = [(module, name, p) for module, name, p in named if p is not None and isinstance(p, DTensor)]
    full = {p: _full(p, kind, dtype if p in cast else p.dtype) for p in dict.fromkeys(p for _, _, p in sharded)}
    hooks = [(part, part._forward_pre_hooks, part._forward_hooks, vars(part).pop("generate", None)) for part in parts]
    try:
        for module, name, p in sharded:
            module._parameters[name] = full[p]
        for part, before, after, _ in hooks:
            part._forward_pre_hooks, part._forward_hooks = _of_others(before), _of_others(after)
        yield
    finally:
        for part, before, after, generate in hooks:
            part._forward_pre_hooks, part._forward_hooks = before, after
            vars(part).update({} if generate is None else {"generate": generate})
        for module, name, p in sharded:
            module._parameters[name] = p


def _full(p: Any, kind: str, dtype: torch.dtype) -> nn.Parameter:
    """A full weight, sent in the given dtype."""
    mine = p.detach().to_local().to(kind, dtype)
    placed = DTensor.from_local(mine, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
    return nn.Parameter(placed.full_tensor(), requires_grad=False)


def _of_others(hooks: dict[int, Any]) -> OrderedDict[int, Any]:
    """Hooks that are not FSDP2's."""
    ours = {key for key, x in hooks.items() if type(getattr(x, "__self__", None)).__name__ == "FSDPState"}
    return OrderedDict((key, x) for key, x in hooks.items() if key not in ours)


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
