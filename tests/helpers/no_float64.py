"""A device without float64, as Apple's GPUs are: tensors that say so and compute on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lit_ppo.device import exact_device, has_float64

DEVICE = torch.device("mps", 0)


class OnDevice(Tensor):
    """A tensor of that device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        wrapped: OnDevice = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=DEVICE, **layout)
        wrapped.inner = inner
        return wrapped

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner})"

    def __getitem__(self, index: Any) -> "OnDevice":  # torch would look for the device to put lists there
        parts = index if isinstance(index, tuple) else (index,)
        return _wrapped(self.inner[tuple(x.inner if isinstance(x, OnDevice) else x for x in parts)])

    def __invert__(self) -> Tensor:
        return self.bitwise_not()

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Tensors that are made on the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    on_device = any(isinstance(x, OnDevice) for x in leaves)
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": "cpu"} if on_device else kwargs
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
    result = function(*args, **kwargs)
    if not on_device:
        return result
    written = {id(x.inner): x for x in leaves if isinstance(x, OnDevice)}  # in place

    def out(x: Any) -> Any:
        return x if not isinstance(x, Tensor) else written[id(x)] if id(x) in written else _wrapped(x)

    return tree_map(out, result)


def _wrapped(x: Tensor) -> OnDevice:
    if x.dtype in (torch.float64, torch.complex128):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return OnDevice(x)


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
