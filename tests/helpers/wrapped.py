"""Tensors that say they lie on another device and compute on the CPU."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class OnDevice(Tensor):
    """A tensor of the device ``kind``; each pretended device has a subclass."""

    kind: ClassVar[str]
    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        device = torch.device(cls.kind, 0)
        wrapped: OnDevice = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=device, **layout)
        wrapped.inner = inner
        return wrapped

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()


def asks_for(kwargs: dict[str, Any], name: str) -> bool | None:
    """Whether an operation names the device; None: it names no device."""
    device = kwargs.get("device")
    return None if device is None else torch.device(device).type == name


def computed(
    function: Any, args: Any, kwargs: dict[str, Any], *, on_device: bool, wrap: Callable[[Tensor], Tensor]
) -> Any:
    """The result of an operation on the CPU, wrapped where it belongs on the device."""
    mine = [x for x in tree_leaves((args, kwargs)) if isinstance(x, OnDevice)]
    if on_device and kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": "cpu"}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
    result = function(*args, **kwargs)
    if not on_device:
        return result
    written = {id(x.inner): x for x in mine}  # in place

    def out(x: Any) -> Any:
        return x if not isinstance(x, Tensor) else written[id(x)] if id(x) in written else wrap(x)

    return tree_map(out, result)
