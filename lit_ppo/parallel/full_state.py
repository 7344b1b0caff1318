"""Whole tensors out of the ranks' shares, and back: checkpoints and exports that look like one process's."""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies.parallel import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lit_ppo.parallel.ranks import n_ranks, rank
from lit_ppo.parallel.sharding import is_sharded


def whole_weights(root: nn.Module, prefix: str = "", *, trained: bool = False) -> dict[str, Tensor] | None:
    """A state dict of whole tensors on the host of the first rank, tied ones tied; empty on others. Collective.

    Args:
        root: What :func:`lit_ppo.parallel.sharding.shard` returned.
        prefix: Only names that begin so, without it.
        trained: Leave frozen weights out.

    Returns:
        None if nothing is sharded: the model's own state dict is it.
    """
    if not is_sharded(root):
        return None
    named = root.named_parameters(remove_duplicate=False)
    parameters: dict[str, Any] = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in named}
    frozen = {name for name, p in parameters.items() if trained and not p.requires_grad}
    state = _whole_state_dict(root, leave_out=frozen, keep_vars=True)
    first: dict[Any, Tensor] = {}
    tied = {name: first.setdefault(parameters.get(name, name), tensor) for name, tensor in state.items()}
    return {name.removeprefix(prefix): tensor for name, tensor in tied.items() if name.startswith(prefix)}


def _whole_state_dict(module: nn.Module, leave_out: Collection[str] = (), **options: Any) -> dict[str, Tensor]:
    with ExitStack() as stack:
        for unit in FSDP1.fsdp_modules(module, root_only=True):
            # offloading what is on the host already would free it
            away = torch.device(unit.compute_device or "cpu").type != "cpu"
            config = FullStateDictConfig(offload_to_cpu=away, rank0_only=away)
            stack.enter_context(FSDP1.state_dict_type(unit, StateDictType.FULL_STATE_DICT, config))
        state = module.state_dict(**options)
    whole = {name: _whole(tensor) for name, tensor in state.items() if name not in leave_out}
    return whole if rank() == 0 else {}


def _whole(value: Any) -> Any:
    """On the first rank's host; None on others."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return (value.detach().cpu() if isinstance(value, Tensor) else value) if rank() == 0 else None


def _share(parameter: Tensor, whole: Any) -> Any:
    """This rank's share of a weight, or of what an optimizer keeps for one."""
    if isinstance(parameter, DTensor) and isinstance(whole, Tensor) and whole.shape == parameter.shape:
        whole = whole.to(parameter.device)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    if getattr(parameter, "whole_shape", None) == getattr(whole, "shape", ()):  # FSDP1: a run of the flat weight
        ends = torch.tensor(_of_all_ranks(parameter.numel())).cumsum(0)
        return whole.flatten()[ends[rank()] - parameter.numel() : ends[rank()]].to(parameter.device)
    return whole


def _of_all_ranks(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * n_ranks()
    dist.all_gather_object(everyone, value)
    return everyone


class WholeCheckpoints(ParallelStrategy):
    """Checkpoints are one file of whole tensors, under the names and numbers that one process gives them."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over optimizer states as it does on one process."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on the first rank, nothing on others. Collective."""
        assert self.lightning_module is not None
        return _whole_state_dict(self.lightning_module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state in whole tensors on the first rank, nothing on others. Collective."""
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = plain.state_dict()
        parameters = [p for group in plain.param_groups for p in group["params"]]
        if any(hasattr(p, "whole_shape") for p in parameters):
            state["state"] = _joined(parameters, state["state"])
        else:
            state["state"] = {n: {k: _whole(v) for k, v in values.items()} for n, values in state["state"].items()}
        return state if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; whole tensors stay in the file until each rank takes its share."""
        checkpoint: dict[str, Any] = torch.load(
            checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only
        )
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's share of the weights."""
        assert self.lightning_module is not None
        module, whole = self.lightning_module, checkpoint["state_dict"]
        own = dict(module.named_parameters(remove_duplicate=False))  # FSDP1's have other names, and load whole ones
        shares = {name: _share(own[name], x) if name in own else x for name, x in whole.items()}
        module.load_state_dict(shares, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's share of the optimizer states. Collective."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            shares = {
                number: {name: _share(parameter, value) for name, value in state["state"][number].items()}
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in state["state"]
            }
            optimizer.load_state_dict({**state, "state": shares})


def _joined(parameters: list[Tensor], state: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Optimizer states of FSDP1, in which a rank keeps a run of each flat weight, or nothing of it."""
    held = {number: values for number, values in state.items() if parameters[number].numel()}
    whole: dict[int, dict[str, Any]] = {}
    for number in sorted({number for numbers in _of_all_ranks(list(held)) for number in numbers}):
        parts = [part for part in _of_all_ranks({k: _whole_or(v) for k, v in held.get(number, {}).items()}) if part]
        shape = parameters[number].whole_shape
        whole[number] = {
            name: torch.cat([part[name] for part in parts]).view(shape) if _is_run(value) else value
            for name, value in parts[0].items()
        }
    return whole


def _is_run(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1


def _whole_or(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
