"""FSDP2 for Lightning: ``Trainer(strategy="fsdp2")`` once this module is imported."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer

from lit_ppo.sharding import load_shares, share_of, whole_on_first_rank

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class FSDP2Strategy(ModelParallelStrategy):
    """Shards weights, gradients and optimizer states over all ranks with PyTorch's ``fully_shard``.

    A model's blocks are gathered one at a time; sampling and scoring gather a whole model for as long as they run.
    Checkpoints are one file with whole tensors, which one process, DDP or another number of ranks load as well.

    Args:
        mixed_precision: Dtype of gathered weights and of what is computed with them, such as ``"bfloat16"``, or a
            ``MixedPrecisionPolicy``; weights are kept, gradients summed and optimizers stepped in float32.
        offload_frozen: Keep the shares of reference and reward model in host memory between their uses.
        sync_every_micro_batch: Exchange gradients after each micro-batch: more traffic, but no rank ever holds whole
            gradients. By default they are exchanged once an optimizer step.
        process_group_backend: As in Lightning.
        timeout: Of collectives.
    """

    def __init__(
        self,
        mixed_precision: str | MixedPrecisionPolicy | None = None,
        offload_frozen: bool = False,
        sync_every_micro_batch: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if isinstance(mixed_precision, str):
            if mixed_precision not in DTYPES:
                raise ValueError(
                    f"FSDP2Strategy(mixed_precision={mixed_precision!r}): must be one of {', '.join(DTYPES)}, "
                    "or a MixedPrecisionPolicy"
                )
            mixed_precision = MixedPrecisionPolicy(DTYPES[mixed_precision], torch.float32)
        # not to be rounded: uniform numbers that come in, log-probs and values that go out
        policy = mixed_precision or MixedPrecisionPolicy()
        self.mixed_precision = replace(policy, cast_forward_inputs=False, output_dtype=None)
        self.offload_frozen = offload_frozen
        self.sync_every_micro_batch = sync_every_micro_batch
        self._offloaded: list[nn.Module] = []

    def setup_environment(self) -> None:
        """All ranks share one model."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, module: nn.Module, *, frozen: bool = False, exact: bool = False) -> nn.Module:
        """Leave this rank its share of a module's parameters that are in no unit yet.

        Args:
            module: A block, or the module around blocks.
            frozen: It is not trained.
            exact: It computes in the dtype of its weights, whatever ``mixed_precision`` is.
        """
        offload: OffloadPolicy = OffloadPolicy()
        if frozen and self.offload_frozen:
            offload = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
            self._offloaded.append(module)
        fully_shard(
            module,
            mesh=self.device_mesh["data_parallel"],
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False) if exact else self.mixed_precision,
            offload_policy=offload,
        )
        if hasattr(module, "generate"):  # gathers as the forward does
            register_fsdp_forward_method(module, "generate")
        return module

    def model_to_device(self) -> None:
        """Move what is not sharded; shares are where they belong."""
        kept = {tensor: tensor for module in self._offloaded for tensor in module.parameters()}
        assert self.model is not None
        self.model._apply(lambda tensor: kept[tensor] if tensor in kept else tensor.to(self.root_device))

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Backwards inside this add to each rank's own gradients."""
        assert self.model is not None
        units = [] if self.sync_every_micro_batch else [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)

    # Checkpoints: whole tensors in one file, under the names and numbers that an unsharded run gives them

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over optimizer states as it does on one process."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole weights on the first rank, nothing on others. Collective."""
        assert self.lightning_module is not None
        state = {name: whole_on_first_rank(tensor) for name, tensor in self.lightning_module.state_dict().items()}
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state in whole tensors on the first rank, nothing on others. Collective."""
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = _whole(plain.state_dict())
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
        load_shares(self.lightning_module, checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's share of the optimizer states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            shares = {
                number: {name: _share(parameter, value) for name, value in state["state"][number].items()}
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in state["state"]
            }
            optimizer.load_state_dict({**state, "state": shares})


def _share(parameter: Tensor, value: Any) -> Any:
    """This rank's share of what an optimizer keeps for each weight; a count of steps is for all of them."""
    per_weight = isinstance(value, Tensor) and value.shape == parameter.shape
    return share_of(parameter, value) if per_weight else value


def _whole(state: Any) -> Any:
    if isinstance(state, Tensor):
        return whole_on_first_rank(state)
    if isinstance(state, dict):
        return {name: _whole(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(_whole, state))
    return state


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Shards over all ranks (FSDP2)", override=True)
