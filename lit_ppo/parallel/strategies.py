"""Strategies that share models out: ``Trainer(strategy="fsdp2")`` or ``"fsdp"``, once this module is imported."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import SGD, Adagrad

from lit_ppo.parallel.full_state import WholeCheckpoints
from lit_ppo.parallel.sharding import fsdp1_unit


class FSDP2Strategy(WholeCheckpoints, ModelParallelStrategy):
    """Shards weights, gradients and optimizer states over all ranks with PyTorch's ``fully_shard``.

    A model's blocks are gathered one at a time; sampling and scoring gather a whole model for as long as they run.
    Checkpoints are one file with whole tensors, which one process, DDP or another number of ranks load as well.

    Args:
        mixed_precision: Dtype of gathered weights and of what is computed with them, ``"bfloat16"`` or as in
            a ``MixedPrecisionPolicy``; weights are kept, gradients summed and optimizers stepped in float32.
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
            if mixed_precision != "bfloat16":
                raise ValueError(
                    f"FSDP2Strategy(mixed_precision={mixed_precision!r}): must be 'bfloat16', a MixedPrecisionPolicy, "
                    "or null for float32"
                )
            mixed_precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
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

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Refuse the fused kernels that PyTorch does not have for shares; it would say so in the first update."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if isinstance(optimizer, SGD | Adagrad) and any(group.get("fused") for group in optimizer.param_groups):
                name = type(optimizer).__name__
                raise ValueError(
                    f"{name}(fused=True): PyTorch has no fused {name} for FSDP2Strategy; set fused to false"
                )

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


class FSDP1Strategy(WholeCheckpoints, FSDPStrategy):
    """FSDP's first version: Lightning's strategy with a unit for each model, and checkpoints as FSDP2Strategy's.

    Lightning alone would put actor and critic into one unit, whose parts cannot run by themselves.

    Args:
        **options: Of ``lightning.pytorch.strategies.FSDPStrategy``.
    """

    def shard(self, module: nn.Module, *, frozen: bool = False, exact: bool = False) -> nn.Module:
        """Wrap a module; the arguments are those of :meth:`FSDP2Strategy.shard`."""
        return fsdp1_unit(self, module, frozen=frozen, exact=exact)


for _name, _strategy in {"fsdp2": FSDP2Strategy, "fsdp": FSDP1Strategy}.items():
    StrategyRegistry.register(_name, _strategy, description=str(_strategy.__doc__).splitlines()[0], override=True)
