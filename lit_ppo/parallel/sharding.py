"""Models whose weights lie in shares on all ranks: how they get there, and who must see them whole.

Where no strategy shards, everything here leaves models as they are.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor

from lit_ppo.parallel.ranks import rank

M = TypeVar("M", bound=nn.Module)


def shards(strategy: Any) -> bool:
    """Whether a Trainer's strategy keeps weights in shares."""
    return hasattr(strategy, "shard") or isinstance(strategy, FSDPStrategy)


def build(strategy: Any, make: Callable[[], M]) -> M:
    """A model built by every rank; under a strategy that shards by the first one alone.

    The others get it without weights (on the meta device) but otherwise alike, until :func:`shard` sends each rank
    its share: no rank but the first ever holds a whole copy.

    Args:
        strategy: The Trainer's; None without one.
        make: Builds it.

    Raises:
        RuntimeError: The first rank failed, with its message.
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
            failure, sent = error, [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(sent)
    if failure is not None:
        raise failure
    if isinstance(sent[0], str):
        raise RuntimeError(f"rank 0 failed: {sent[0]}")
    return made if made is not None else cast(M, pickle.loads(sent[0]))


def shard(strategy: Any, model: M, *, frozen: bool = False) -> M:
    """Leave this rank its share of a model that :func:`build` made: block by block, then the rest as one.

    Args:
        strategy: The Trainer's; None without one.
        model: The module whose forward is called; its attribute ``exact`` names parts that compute in float32.
        frozen: It is not trained.
    """
    if not shards(strategy):
        return model
    unit = getattr(strategy, "shard", None) or partial(fsdp1_unit, strategy)
    exact = [getattr(model, name) for name in getattr(model, "exact", ())]
    model.sharded = True  # type: ignore[assignment]
    for module in [*exact, *blocks(model), model]:
        _receive(module, strategy.root_device)
        wrapped = unit(module, frozen=frozen, exact=module in exact)
        if wrapped is not module and module is not model:
            _replace(model, module, wrapped)
    return cast(M, wrapped)


def check_placed(strategy: Any, module: nn.Module) -> None:
    """Check that a module which has its models has them as a strategy wants them.

    Raises:
        ValueError: They are whole and were to be shared out, or the other way round.
    """
    if shards(strategy) != is_sharded(module):
        how = "whole, and this strategy shards" if shards(strategy) else "in shares, and this strategy takes whole ones"
        raise ValueError(
            f"Trainer(strategy={type(strategy).__name__}): the models of this {type(module).__name__} were built "
            f"before, {how}; make a new {type(module).__name__}"
        )


def fsdp1_unit(strategy: FSDPStrategy, module: nn.Module, *, frozen: bool, exact: bool) -> nn.Module:
    """Wrap a module as Lightning's strategy was told to; the arguments are those of ``FSDP2Strategy.shard``."""
    for parameter in module.parameters():
        if not hasattr(parameter, "whole_shape"):
            parameter.whole_shape = parameter.shape  # type: ignore[attr-defined]
    options = {"device_id": strategy.root_device} | strategy.kwargs
    options.pop("auto_wrap_policy", None)
    return FSDP1(
        module,
        cpu_offload=strategy.cpu_offload,
        mixed_precision=None if exact else strategy.mixed_precision_config,
        sharding_strategy=strategy.sharding_strategy,
        **options,
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a Hugging Face model that are never split, inner ones first."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in reversed(list(model.modules())) if type(module).__name__ in names]


def is_sharded(module: nn.Module) -> bool:
    """Whether weights of a module lie in shares."""
    return any(isinstance(part, FSDPModule | FSDP1) for part in module.modules())


@contextmanager
def gathered(model: nn.Module | None) -> Iterator[None]:
    """Every rank holds the whole model until the end of this; inside, ranks may run as many forwards as they like.

    Collective at its beginning; without gradients.

    Args:
        model: What :func:`shard` returned; None is nothing to gather.
    """
    if isinstance(model, FSDP1):
        with FSDP1.summon_full_params(model, writeback=False), _without_wrappers(model):
            yield
        return
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


@contextmanager
def without_gradient_sync(strategy: Any, *models: nn.Module | None) -> Iterator[None]:
    """Backwards inside this add to each rank's own gradients; the first one after it exchanges what has gathered.

    Args:
        strategy: The Trainer's.
        *models: That are trained.
    """
    with ExitStack() as stack:
        if hasattr(strategy, "block_backward_sync"):
            stack.enter_context(strategy.block_backward_sync())
        for model in models:
            if isinstance(model, FSDP1):
                stack.enter_context(model.no_sync())
        yield


def total_norm(model: nn.Module, tensors: list[Tensor]) -> Tensor:
    """Norm over all ranks of a model's gradients, or of other tensors cut like them.

    Args:
        model: Whose they are.
        tensors: On this rank.
    """
    norm = nn.utils.get_total_norm(tensors)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if isinstance(model, FSDP1):
        squared = norm.to(model.compute_device).square()
        dist.all_reduce(squared)
        norm = squared.sqrt()
    return norm


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scale a model's gradients down to a norm, if they are over it.

    Args:
        model: With gradients.
        max_norm: None leaves them as they are.

    Returns:
        The norm before, over all ranks.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = total_norm(model, [p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _without_weights(model: nn.Module) -> bytes:
    """A copy, to be sent, whose parameters and buffers have shapes but no contents.

    Raises:
        ValueError: Its code was fetched from the hub: the other ranks do not have it.
    """
    fetched = [
        type(part).__name__ for part in model.modules() if type(part).__module__.startswith("transformers_modul")
    ]
    if fetched:
        raise ValueError(f"{fetched[0]}: models with code of their own (trust_remote_code) are not sharded; use 'ddp'")
    hollow: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        hollow[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        hollow[id(buffer)] = torch.empty_like(buffer, device="meta")
    return pickle.dumps(copy.deepcopy(model, hollow))


@torch.no_grad()
def _receive(module: nn.Module, device: torch.device) -> None:
    """Put the first rank's parameters and buffers in place of this rank's, except those that are in shares already."""
    received: dict[Tensor, Tensor] = {}  # by what they replace: tied ones stay tied
    wrapped = {inner for part in module.modules() if isinstance(part, FSDPModule | FSDP1) for inner in part.modules()}
    for part in module.modules():
        if part in wrapped:
            continue
        both: list[Any] = [part._parameters, part._buffers]
        for tensors in both:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in received:
                    whole = tensor.to(device) if rank() == 0 else torch.empty_like(tensor, device=device)
                    whole = whole.detach().contiguous()
                    dist.broadcast(whole.view(torch.uint8) if whole.dtype == torch.bool else whole, src=0)
                    if isinstance(tensor, nn.Parameter):
                        whole = nn.Parameter(whole, requires_grad=tensor.requires_grad)
                    received[tensor] = whole
                tensors[name] = received[tensor]


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for part in model.modules():
        for name, child in part.named_children():
            if child is old:
                setattr(part, name, new)
                return


@contextmanager
def _without_wrappers(model: FSDP1) -> Iterator[None]:
    """Calls of FSDP1's units go straight to what they wrap, whose weights are there already."""
    units = FSDP1.fsdp_modules(model)
    for unit in units:
        unit.forward = unit.module.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for unit in units:
            del unit.forward
