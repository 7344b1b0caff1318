"""Count the bytes of the tensors that code makes, on tensors without storage.

The models' own forward and backward run on them, so that activations and workspace follow from the code and not from
a formula for one family of models.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of the tensors made inside this context: those that still exist, and the most at any time.

    Args:
        existing: Tensors that are there already; views of them count nothing.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._counted = {_storage(tensor) for tensor in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (key := _storage(tensor)) not in self._counted:
                storage = tensor.untyped_storage()
                self._counted.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return made

    def forget_peak(self) -> None:
        """Count the most from here on."""
        self.peak = self.now

    def _freed(self, key: int, n_bytes: int) -> None:
        self._counted.discard(key)
        self.now -= n_bytes


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def hollow_tensors(*models: nn.Module) -> Iterator[None]:
    """Tensors made inside this context have shape and dtype, but no storage.

    Args:
        *models: On the meta device; they can compute inside this context, and only there.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        for model in models:
            _move(model)
        yield


def _move(model: nn.Module) -> None:
    moved: dict[Tensor, Tensor] = {}  # tied weights stay tied
    for part in model.modules():
        both: list[Any] = [part._parameters, part._buffers]
        for tensors in both:
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in moved:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                if tensor is not None:
                    tensors[name] = moved[tensor]
