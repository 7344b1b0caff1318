"""A kernel for rows of any length that computes row by row, in place of one that only a GPU has."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lit_ppo.attention import choice, kernels


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """The interface of the package flash-attn 2; in float64."""
    assert causal
    assert cu_seqlens_q.dtype == torch.int32
    assert window_size[1] in (-1, 0)
    ends = cu_seqlens_q.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    assert ends[0] == 0
    assert sum(lengths) == len(q) == len(k) == len(v)
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[1] // k.shape[1]
    outputs = []
    for start, end in pairwise(ends):
        heads = []
        for head in range(q.shape[1]):
            ours, keys, values = q[start:end, head], k[start:end, head // group], v[start:end, head // group]
            logits = ours.double() @ keys.double().T * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            place = torch.arange(end - start, device=q.device)
            hidden = place > place[:, None]
            if window_size[0] >= 0:
                hidden = hidden | (place < place[:, None] - window_size[0])
            heads.append(torch.softmax(logits.masked_fill(hidden, -torch.inf), -1) @ values.double())
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs).to(q.dtype)


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The interface of ``torch.nn.attention.varlen``."""
    assert window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_k is not None
    return flash_attn_varlen_func(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        softmax_scale=scale, causal=True, window_size=window_size,
    )  # fmt: skip


@contextmanager
def kernel_on_cpu(name: str = "flash_attention_2", dtypes: Any = (torch.float32,)) -> Iterator[list[Any]]:
    """Inside this the CPU has such a kernel; yields a list that gets the arguments of each call.

    Args:
        name: Of the kernel; ``torch`` is torch's own.
        dtypes: That it takes.
    """
    calls: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return (varlen_attn if name == "torch" else flash_attn_varlen_func)(*args, **kwargs)

    noted.__signature__ = inspect.signature(  # type: ignore[attr-defined]
        varlen_attn if name == "torch" else flash_attn_varlen_func
    )
    load = (lambda: kernels.of_torch(noted)) if name == "torch" else (lambda: kernels.of_flash(name, noted))
    choice.kernel_for.cache_clear()
    choice._say.cache_clear()
    with (
        patch.object(kernels, "DEVICES", ("cpu",)),
        patch.object(kernels, "DTYPES", dtypes),
        patch.object(kernels, "installed", lambda: iter([(name, load)])),
        patch.object(kernels, "flash", lambda asked: kernels.of_flash(asked, noted)),
    ):
        yield calls
    choice.kernel_for.cache_clear()
    choice._say.cache_clear()
