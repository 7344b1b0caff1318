"""What differs between kinds of devices."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily


@cache
def has_float64(kind: str) -> bool:
    """Whether devices of this kind, such as ``cuda``, compute in float64. Apple's GPUs and some of Intel's do not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=kind).cumsum(0)
    except (TypeError, RuntimeError):
        return False
    return True


_SUMS: dict[str, bool] = {}  # by kind of device


def sums_in_float32(kind: str) -> bool:
    """Whether devices of this kind sum products of 16-bit numbers in float32 and return the sums so."""
    if kind not in _SUMS:
        try:
            with unset_fake_temporarily():  # tensors without storage can do all
                pair = torch.zeros(8, 8, dtype=torch.bfloat16, device=kind)
                torch.mm(pair, pair, out_dtype=torch.float32)
            _SUMS[kind] = True
        except (TypeError, RuntimeError):
            _SUMS[kind] = False
    return _SUMS[kind]


_AS_CUDA = False  # the CPU stands for a GPU


@contextmanager
def cpu_as_cuda(on: bool) -> Iterator[None]:
    """Inside this context, if it is on, the CPU stands for a GPU: tensors without storage compute as there."""
    global _AS_CUDA
    before = sums_in_float32("cpu"), _AS_CUDA
    _SUMS["cpu"], _AS_CUDA = on or before[0], on or before[1]
    try:
        yield
    finally:
        _SUMS["cpu"], _AS_CUDA = before


def is_cpu(device: torch.device) -> bool:
    """Whether a device is the CPU and does not stand for a GPU."""
    return device.type == "cpu" and not _AS_CUDA


@cache
def exact_device(device: torch.device) -> torch.device:
    """Where to compute in float64 with the values of a device: there, or else on the CPU."""
    return device if has_float64(device.type) else torch.device("cpu")


def matmul_precision() -> str | None:
    """As ``torch.set_float32_matmul_precision`` takes it; None where it was set for CUDA through ``torch.backends``."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch does not mix the two ways
        return None


def _set_precision(precision: str | None, of_cuda: str | None) -> None:
    if precision is not None:
        torch.set_float32_matmul_precision(precision)
    elif of_cuda is not None:
        torch.backends.cuda.matmul.fp32_precision = of_cuda


@contextmanager
def bf16_products(kind: str, on: bool = True) -> Iterator[None]:
    """Inside this, a CPU may round float32 numbers to bfloat16 to multiply them; it sums the products in float32.

    Args:
        kind: Of device; nothing changes on others.
        on: False: nothing changes.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    if not on or kind != "cpu" or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


UNIT_ROWS = 32
"""The answer of :func:`rounds_to_bf16` holds for inputs of at least so many rows."""
_UNIT_WEIGHTS, _UNIT_OUTPUTS = 2**13, 16  # for fewer, a CPU may take other instructions


def rounds_to_bf16(kind: str, outputs: int, inputs: int) -> bool:
    """Whether devices of a kind round a linear layer's numbers inside :func:`bf16_products`, as CPUs with AMX do.

    Args:
        kind: Of device.
        outputs: Of the layer.
        inputs: Of the layer.
    """
    enough = outputs >= _UNIT_OUTPUTS and outputs * inputs >= _UNIT_WEIGHTS
    return kind == "cpu" and enough and _cpu_rounds_to_bf16(inputs)


@cache
def _cpu_rounds_to_bf16(inputs: int) -> bool:
    outputs = max(_UNIT_OUTPUTS, -(-_UNIT_WEIGHTS // inputs))  # the fewest that are enough
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    with unset_fake_temporarily(), torch.autocast("cpu", enabled=False), bf16_products("cpu"):
        x = torch.full((UNIT_ROWS, inputs), 257.0, **options)  # bfloat16 has 256 and 258
        return bool(torch.nn.functional.linear(x, torch.ones(outputs, inputs, **options)).eq(256 * inputs).all())


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype to which autocast casts on devices of a kind; None: it is off."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside this, float32 products are in full float32, neither in TF32 nor in autocast's dtype."""
    before = matmul_precision()
    own = None if before else torch.backends.cuda.matmul.fp32_precision
    _set_precision("highest" if before else None, "ieee")
    try:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda", "mps", "xpu"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        _set_precision(before, own)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU, had no memory left."""
    signs = ("out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)
