"""Checks of the Trainer that every module makes in ``setup``, before models are loaded."""

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

import lit_ppo.parallel.strategies  # noqa: F401  # registers fsdp2
from lit_ppo.parallel.checkpoint_io import guard_sharded
from lit_ppo.parallel.lost_ranks import watch_instead_of_lightning


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse the first version of FSDP and sharded checkpoints with code, and have lost ranks named.

    Warns if the CPU emulates bf16.

    Raises:
        ValueError: The strategy is Lightning's ``FSDPStrategy``.
    """
    guard_sharded(trainer)
    watch_instead_of_lightning()
    if isinstance(trainer.strategy, FSDPStrategy):
        raise ValueError(
            "Trainer(strategy=FSDPStrategy): the first version of FSDP is not supported; use strategy='fsdp2'"
        )
    if trainer.precision == "bf16-mixed" and trainer.strategy.root_device.type == "cpu" and emulates_bf16():
        rank_zero_warn(
            "Trainer(precision='bf16-mixed'): this CPU has no bf16 instructions and emulates them, which can take 100 "
            "times as long; use precision='32-true'"
        )


def emulates_bf16() -> bool:
    """Whether bf16 matrix products on this CPU do without oneDNN's kernels."""
    return torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
