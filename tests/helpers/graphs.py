"""A stand-in for CUDA graphs on CPUs: recording computes nothing, and a replay runs the recorded kernels again."""

from typing import Any
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorded(TorchDispatchMode):
    """Keeps the kernels that run, each with the very tensors that it reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Any] = []
        self.before: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                storage = value.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        output = func(*args, **(kwargs or {}))
        self.kernels.append((func, args, kwargs or {}, output))
        return output


class Graph:
    """Has the methods of ``torch.cuda.CUDAGraph``."""

    made = 0
    replays = 0
    of_pool: dict[Any, WeakSet[Any]] = {}

    def capture_begin(self, *, pool: Any, **_: Any) -> None:
        Graph.made += 1
        assert len(self.of_pool.setdefault(pool, WeakSet([self]))) > 0  # PyTorch frees a pool with its last graph
        self.of_pool[pool].add(self)
        self.recorded = Recorded()
        self.recorded.__enter__()

    def capture_end(self) -> None:
        self.recorded.__exit__(None, None, None)
        for storage, content in self.recorded.before.values():
            storage.copy_(content)

    def replay(self) -> None:
        Graph.replays += 1
        for func, args, kwargs, output in self.recorded.kernels:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
