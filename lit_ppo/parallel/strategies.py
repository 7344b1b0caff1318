"""Shard models over ranks with FSDP2: ``Trainer(strategy="fsdp2")``, once this module is imported."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import SGD, Adagrad, Optimizer

from lit_ppo.constructor import constructor
from lit_ppo.parallel.checkpoint_io import check_keys, readable
from lit_ppo.parallel.environment import reserve_port
from lit_ppo.parallel.full_state import (
    full_optimizer_state,
    full_state_dict,
    load_full_optimizer_states,
    load_full_state_dict,
)
from lit_ppo.validate import boolean, refuse, text_or_none


class FSDP2Strategy(ModelParallelStrategy):
    """Shards weights, gradients and optimizer states over all ranks with PyTorch's ``fully_shard``.

    Forward and backward gather one block of a model at a time; sampling and scoring gather a full model while they
    run. A checkpoint is one file of full tensors. Any strategy on any number of ranks can resume it.

    Args:
        mixed_precision: Dtype of gathered weights and of their computations: ``"bfloat16"``, or as in a
            ``MixedPrecisionPolicy``. Weights are stored, gradients reduced and optimizers stepped in float32.
        offload_frozen: Keep the shards of reference and reward model in CPU memory while they are not used.
        sync_every_micro_batch: Reduce gradients after each micro-batch. This costs more communication, but no rank
            ever holds full gradients. By default gradients are reduced once per optimizer step.
        process_group_backend: As in Lightning.
        timeout: Of collectives.
    """

    @constructor
    def __init__(
        self,
        mixed_precision: str | MixedPrecisionPolicy | None = None,
        offload_frozen: bool = False,
        sync_every_micro_batch: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:
        if timeout is not None and not (isinstance(timeout, timedelta) and timeout > timedelta(0)):
            refuse(self, "timeout", timeout, "must be a datetime.timedelta above 0, or None")
        text_or_none(self, "process_group_backend", process_group_backend)
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if isinstance(mixed_precision, str) and mixed_precision == "bfloat16":
            mixed_precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        if not isinstance(mixed_precision, MixedPrecisionPolicy | None):
            problem = "must be 'bfloat16', a MixedPrecisionPolicy, or null for float32"
            refuse(self, "mixed_precision", mixed_precision, problem)
        # forwards take the hidden states of other models and return log-probs and values: neither may be rounded
        policy = mixed_precision or MixedPrecisionPolicy()
        self.mixed_precision = replace(policy, cast_forward_inputs=False, output_dtype=None)
        self.offload_frozen = boolean(self, "offload_frozen", offload_frozen)
        self.sync_every_micro_batch = boolean(self, "sync_every_micro_batch", sync_every_micro_batch)
        self._offloaded: list[nn.Module] = []

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        reserve_port(self)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, module: nn.Module, *, frozen: bool = False, exact: bool = False) -> None:
        """Shard those parameters of a module that no inner unit holds.

        Args:
            module: A block, or the module around blocks.
            frozen: The module is not trained.
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

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:  # PyTorch itself would raise in the first update
            if isinstance(optimizer, SGD | Adagrad) and any(group.get("fused") for group in optimizer.param_groups):
                name = type(optimizer).__name__
                refuse(name, "fused", True, f"PyTorch has no fused {name} for FSDP2Strategy; set fused to false")

    def model_to_device(self) -> None:
        kept = {tensor: tensor for module in self._offloaded for tensor in module.parameters()}
        assert self.model is not None
        self.model._apply(lambda tensor: kept[tensor] if tensor in kept else tensor.to(self.root_device))

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Backward passes in this context accumulate local gradients."""
        assert self.model is not None
        units = [] if self.sync_every_micro_batch else [m for m in self.model.modules() if isinstance(m, FSDPModule)]
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return full_state_dict(self.lightning_module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return full_optimizer_state(optimizer)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        with readable(checkpoint_path):
            checkpoint: dict[str, Any] = torch.load(
                checkpoint_path, map_location="cpu", mmap=True, weights_only=weights_only
            )
        check_keys(checkpoint_path, checkpoint)
        return checkpoint  # its tensors stay in the file until each rank reads its shards

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        load_full_state_dict(self.lightning_module, checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        load_full_optimizer_states(self.optimizers, checkpoint["optimizer_states"])


StrategyRegistry.register("fsdp2", FSDP2Strategy, description=str(FSDP2Strategy.__doc__).splitlines()[0], override=True)
