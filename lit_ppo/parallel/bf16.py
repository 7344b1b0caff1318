"""Whether bf16-mixed pays on this device: many CPUs have no bf16 matrix units and emulate them."""

from collections.abc import Callable
from time import perf_counter

import torch
from lightning.pytorch.utilities import rank_zero_warn

REPETITIONS = 3
ENOUGH_SECONDS = 0.2  # a product that takes this long is not timed again
SLOWER = 1.2  # times as long; less is noise


def warn_if_slower(precision: str, device: torch.device) -> None:
    """Warn where ``bf16-mixed`` was asked for and bf16 matrix products take longer than float32 ones.

    Args:
        precision: The trainer's.
        device: The module's.
    """
    if precision != "bf16-mixed":
        return
    times = time_product(torch.bfloat16, device) / time_product(torch.float32, device)
    if times > SLOWER:
        rank_zero_warn(
            f"Trainer(precision='bf16-mixed'): bf16 matrix products take {times:.3g} times as long as float32 here "
            f"(on {device.type}); use precision='32-true'"
        )


def time_product(dtype: torch.dtype, device: torch.device, timer: Callable[[], float] = perf_counter) -> float:
    """Seconds of one matrix product, the best of a few; only the first where that is slow already.

    Args:
        dtype: Of both factors.
        device: Where.
        timer: Seconds since some moment.
    """
    # emulated bf16 takes a third of a second at 512; an accelerator computes that faster than it is launched
    size = 512 if device.type == "cpu" else 4096
    factor = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    with torch.autocast(device.type, enabled=False):  # which would make every product one in bf16
        for _ in range(1 + REPETITIONS):  # the first also sets up the kernel
            start = timer()
            (factor @ factor)[0, 0].item()  # waits for the device
            best = min(best, timer() - start)
            if best > ENOUGH_SECONDS:
                break
    return best
