"""The scoring head of a sequence classifier, in float32: one number a text, and bf16 would make many of them equal."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def score_in_float32(model: Any) -> Any:
    """Let the modules of a sequence classifier that follow its backbone compute in float32, also under autocast.

    Args:
        model: Hugging Face sequence classifier, not sharded yet; returned.
    """
    backbone = model.base_model
    heads = {name: child for name, child in model.named_children() if child is not backbone}
    if backbone is model:  # its class does not say which part is the backbone
        heads = {name: heads[name] for name in ("score", "classifier") if name in heads}
    for head in heads.values():
        head.float()
        head.forward = partial(_float32, head.forward)
    model.exact = tuple(name for name, head in heads.items() if list(head.parameters()))  # for `shard`
    return model


def _float32(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    def cast(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    with torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
        return forward(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})
