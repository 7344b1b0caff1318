"""Full tensors out of shards and back: checkpoints and exports that are the same as those of one process."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lit_ppo.parallel.ranks import rank
from lit_ppo.parallel.sharding import is_sharded


def full_weights(root: nn.Module, prefix: str = "", *, trained: bool = False) -> dict[str, Tensor] | None:
    """A state dict of full tensors on rank 0's CPU, in which tied weights stay tied; empty on other ranks. Collective.

    Args:
        root: What :func:`lit_ppo.parallel.sharding.shard` returned.
        prefix: Keep only names with this prefix, and remove it.
        trained: Leave out frozen weights.

    Returns:
        None if nothing is sharded: use the model's own state dict.
    """
    if not is_sharded(root):
        return None
    parameters = dict(root.named_parameters(remove_duplicate=False))
    frozen = {name for name, p in parameters.items() if trained and not p.requires_grad}
    state = full_state_dict(root, leave_out=frozen)
    first: dict[Any, Tensor] = {}
    tied = {name: first.setdefault(parameters.get(name, name), tensor) for name, tensor in state.items()}
    return {name.removeprefix(prefix): tensor for name, tensor in tied.items() if name.startswith(prefix)}


def full_state_dict(module: nn.Module, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
    """A module's state dict of full tensors on rank 0's CPU; empty on other ranks. Collective.

    Args:
        module: Sharded, or with sharded parts.
        leave_out: Names to leave out.
    """
    full = {name: _full(tensor) for name, tensor in module.state_dict().items() if name not in leave_out}
    return full if rank() == 0 else {}


def load_full_state_dict(module: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Load this rank's shards of full weights."""
    own = dict(module.named_parameters(remove_duplicate=False))
    shards = {name: _shard(own[name], full) if name in own else full for name, full in state.items()}
    module.load_state_dict(shards, strict=strict)


def full_optimizer_state(optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
    """An optimizer's state in full tensors on rank 0; empty on other ranks. Collective."""
    plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
    state: dict[str, Any] = plain.state_dict()
    state["state"] = {n: {k: _full(v) for k, v in values.items()} for n, values in state["state"].items()}
    return state if rank() == 0 else {}


def load_full_optimizer_states(optimizers: Sequence[Optimizer], states: Sequence[Mapping[str, Any]]) -> None:
    """Load this rank's shards of full optimizer states."""
    for optimizer, state in zip(optimizers, states, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        shards = {
            number: {name: _shard(parameter, value) for name, value in state["state"][number].items()}
            for number, parameter in zip(numbers, parameters, strict=True)
            if number in state["state"]
        }
        optimizer.load_state_dict({**state, "state": shards})


def _full(value: Any) -> Any:
    """A full tensor on rank 0's CPU; None on other ranks. Collective if ``value`` is sharded."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return (value.detach().cpu() if isinstance(value, Tensor) else value) if rank() == 0 else None


def _shard(parameter: Tensor, full: Any) -> Any:
    """This rank's shard of a weight, or of an optimizer state of the weight's shape."""
    if isinstance(parameter, DTensor) and isinstance(full, Tensor) and full.shape == parameter.shape:
        full = full.to(parameter.device)
        return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return full
