"""A device without float64, as Apple's GPUs are: tensors that say so and compute on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_ppo.device import exact_device, has_float64
from tests.helpers.wrapped import OnDevice, asks_for, computed

DEVICE = torch.device("mps", 0)


class _OnMPS(OnDevice):
    """A tensor of that device."""

    kind = DEVICE.type

    def __getitem__(self, index: Any) -> OnDevice:  # torch would look for the device to put lists there
        parts = index if isinstance(index, tuple) else (index,)
        return _wrapped(self.inner[tuple(x.inner if isinstance(x, OnDevice) else x for x in parts)])

    def __invert__(self) -> Tensor:
        return self.bitwise_not()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Tensors that are made on the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    asked = asks_for(kwargs, DEVICE.type)
    on_device = any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs))) if asked is None else asked
    return computed(function, args, kwargs, on_device=on_device, wrap=_wrapped)


def _wrapped(x: Tensor) -> OnDevice:
    if x.dtype in (torch.float64, torch.complex128):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return _OnMPS(x)


def patch_tensor(name: str) -> Any:
    return patch.object(torch, name, _made_on_cpu(getattr(torch, name)))


def _made_on_cpu(make: Any) -> Any:
    """``torch.tensor`` and ``torch.as_tensor`` look for the device before anyone can answer for it."""

    def made(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != DEVICE.type:
            plain: Tensor = make(data, device=device, **kwargs)
            return plain
        return data if isinstance(data, OnDevice) else _wrapped(make(data, **kwargs))

    return made


def _forget() -> None:
    has_float64.cache_clear()
    exact_device.cache_clear()


@contextmanager
def device_without_float64() -> Iterator[torch.device]:
    """Inside this there is such a device."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _forget()
    try:
        with _Factories(), patch_tensor("tensor"), patch_tensor("as_tensor"):
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        _forget()
