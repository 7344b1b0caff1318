"""Precision: float32 products by device, and trained weights in bfloat16 (``bf16-true``)."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lit_ppo.device import matmul_precision
from lit_ppo.optim.settings import make_optimizer
from lit_ppo.parallel.sharding import shards
from lit_ppo.validate import one_of, refuse

MatmulPrecision = Literal["highest", "high", "medium"]
REMEDY = (
    "use 'bf16-mixed', or an optimizer that keeps what is rounded away: optimi.AdamW (pip install torch-optimi), or "
    "torchao.optim.AdamW8bit with bf16_stochastic_round=True (pip install torchao)"
)


def checked_matmul_precision(owner: object, value: Any) -> MatmulPrecision | None:
    """The argument ``float32_matmul_precision``; None: by device."""
    checked: MatmulPrecision | None = value
    if value is not None:
        checked = one_of(owner, "float32_matmul_precision", value, get_args(MatmulPrecision))
    return checked


def apply_matmul_precision(owner: object, given: MatmulPrecision | None, kind: str) -> None:
    """Apply the argument ``float32_matmul_precision`` and say so; nothing by default on a CPU.

    Args:
        owner: The module.
        given: The argument; None: TF32 on CUDA, unless it was set through ``torch.backends``.
        kind: Of device, such as ``cuda``.
    """
    precision = given or ("high" if kind == "cuda" and matmul_precision() is not None else None)
    if precision is not None:
        torch.set_float32_matmul_precision(precision)
        tf32 = " (TF32)" if kind == "cuda" and precision != "highest" else ""
        rank_zero_info(
            f"{type(owner).__name__}(float32_matmul_precision={precision!r}): float32 products are computed so{tf32}"
        )


class Bfloat16Weights(MixedPrecision):
    """``bf16-true`` that computes as ``bf16-mixed`` does, on weights that are kept in bfloat16.

    Lightning's own plugin for ``bf16-true`` makes every new tensor bfloat16, scores included, and all buffers, such as
    the frequencies of rotary positions.

    Args:
        kind: Of device, such as ``cuda``.
    """

    def __init__(self, kind: str) -> None:
        super().__init__("bf16-mixed", kind)
        self.precision = "bf16-true"

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16, cache_enabled=False)


def use_bfloat16_weights(owner: object, trainer: L.Trainer, factories: dict[str, Callable[..., Any]]) -> bool:
    """Prepare a Trainer for trained weights in bfloat16, if its precision is ``bf16-true``; returns whether it is.

    Args:
        owner: The module.
        trainer: Its strategy has not been set up.
        factories: By the names of the owner's arguments, from parameters to optimizer.

    Raises:
        ValueError: An optimizer would lose most of its steps, or the strategy shards.
    """
    if trainer.precision != "bf16-true":
        return False
    if shards(trainer.strategy):
        refuse("Trainer", "precision", "bf16-true", "FSDP2 shards float32 weights; use '32-true' and FSDP2Strategy("
               "mixed_precision='bfloat16'), which gathers and computes in bfloat16")  # fmt: skip
    for name, make in factories.items():
        where = f"{type(owner).__name__}({name}"
        optimizer = make_optimizer(where, make, [nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))])
        problem = "its steps are rounded away in bfloat16 weights, those of Trainer(precision='bf16-true')"
        if not survives_bfloat16(optimizer):
            raise ValueError(f"{where}={type(optimizer).__name__}): {problem}; {REMEDY}")
        if rounds_at_random(optimizer) and trainer.world_size > 1 and getattr(owner, "automatic_optimization", True):
            problem = "rounds at random, and each process would round otherwise; use optimi.AdamW, or one process"
            raise ValueError(f"{where}={type(optimizer).__name__}): {problem}")
    trainer.strategy.precision_plugin = Bfloat16Weights(trainer.strategy.root_device.type)
    return True


def survives_bfloat16(optimizer: Optimizer) -> bool:
    """Whether small steps add up in bfloat16 weights: rounded at random (torchao), or by Kahan's sums (optimi)."""
    kahan = [group.get("kahan_sum", False) is not False for group in optimizer.param_groups]  # None: by dtype
    return rounds_at_random(optimizer) or all(kahan)


def rounds_at_random(optimizer: Optimizer) -> bool:
    """Whether an optimizer draws random numbers to round weights."""
    return bool(getattr(optimizer, "bf16_stochastic_round", False))


def seed_rounding(optimizer: Optimizer, seed: int) -> None:
    """Let an optimizer round with random numbers that depend on the seed and the step alone, the same on every rank.

    Args:
        optimizer: Rounds at random; its steps get no closure that draws random numbers.
        seed: Of the run.
    """
    first = optimizer.param_groups[0]["params"][0]
    drawing = ExitStack()

    def before(*_: Any) -> None:
        devices: Iterable[torch.device] = [] if first.device.type == "cpu" else [first.device]
        kind = "cuda" if first.device.type == "cpu" else first.device.type
        drawing.enter_context(torch.random.fork_rng(devices, device_type=kind))
        step = optimizer.state.get(first, {}).get("step", 0)
        torch.manual_seed((seed * 1_000_003 + int(step)) % 2**63)

    def after(*_: Any) -> None:
        drawing.close()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
