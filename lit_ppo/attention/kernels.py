"""Kernels for rows of any length, from whatever is installed.

A kernel reads the tokens of all rows, one row after another, and where each row starts: no padding exists.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

DEVICES = ("cuda",)
DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)  # that kernels take

Attend = Callable[..., Tensor]
"""``attend(query, key, value, starts, longest, scale=, window=, **extras)``.

Shapes:
    query (N, heads, d), key and value (N, kv_heads, d), starts (rows + 1,) -> (N, heads, d).
"""


@dataclass(frozen=True)
class Kernel:
    """Causal attention of packed rows."""

    name: str
    attend: Attend
    extras: tuple[str, ...] | None = ()  # which of EXTRAS it takes; None: they are ignored, as SDPA ignores them
    any_dtype: bool = False  # else only DTYPES


EXTRAS = ("softcap", "s_aux")  # arguments of attention in transformers: limit of the logits, and sinks


def installed() -> Iterator[tuple[str, Callable[[], Kernel]]]:
    """The kernels that can be imported, the fastest first."""
    if is_flash_attn_3_available():
        yield "flash_attention_3", lambda: flash("flash_attention_3")
    if is_flash_attn_2_available():
        yield "flash_attention_2", lambda: flash("flash_attention_2")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return
    if {"window_size", "scale"} <= inspect.signature(varlen_attn).parameters.keys():  # from torch 2.11
        yield "torch.nn.attention.varlen", lambda: of_torch(varlen_attn)


def flash(name: str) -> Kernel:
    """A kernel of the flash-attn packages or of the hub, as transformers loads it.

    Args:
        name: ``attn_implementation`` of transformers.
    """
    function = lazy_import_flash_attention(name)[0][1]
    return of_flash(name, function)


def of_flash(name: str, function: Callable[..., Any]) -> Kernel:
    """A kernel around a ``flash_attn_varlen_func``, whose versions take different arguments."""
    takes = frozenset(inspect.signature(function).parameters)
    sinks = next((s for s in ("s_aux", "learnable_sink") if s in takes), None)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int,
        *, scale: float | None, window: int | None, softcap: float | None = None, s_aux: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
        if "max_seqlen_q" in takes:
            options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        if window is not None:
            options["window_size"] = (window - 1, 0)  # the token itself is not counted
        if softcap is not None:
            options["softcap"] = softcap
        if s_aux is not None:
            options[str(sinks)] = s_aux.to(query.dtype)
        if "deterministic" in takes:
            options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        found = function(query, key, value, cu_seqlens_q=starts, cu_seqlens_k=starts, **options)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output

    return Kernel(name, attend, ("softcap",) * ("softcap" in takes) + ("s_aux",) * (sinks is not None))


def of_torch(function: Callable[..., Any]) -> Kernel:
    """A kernel around torch's ``varlen_attn``."""
    groups = "enable_gqa" in inspect.signature(function).parameters  # from torch 2.12; before, they need no word

    def attend(
        query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int,
        *, scale: float | None, window: int | None,
    ) -> Tensor:  # fmt: skip
        options: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if groups else {}
        left = -1 if window is None else window - 1  # the token itself is not counted
        output: Tensor = function(
            query, key, value, starts, starts, longest, longest, scale=scale, window_size=(left, 0), **options
        )
        return output

    return Kernel("torch.nn.attention.varlen", attend)


def plain(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int,
    *, scale: float | None, window: int | None, softcap: float | None = None, s_aux: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What a kernel computes, on any device and in any dtype, but with all pairs of tokens in memory."""
    n, groups = len(query), query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    place = torch.arange(n, dtype=starts.dtype, device=query.device)
    row = torch.searchsorted(starts, place, right=True)
    ago = place.unsqueeze(1) - place
    seen = (row.unsqueeze(1) == row) & (ago >= 0) & (ago < (n if window is None else window))
    logits = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    logits = logits.masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.to(logits.dtype).view(-1, 1, 1).expand(-1, n, 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1)[..., :n], value)


PLAIN = Kernel("plain torch", plain, EXTRAS, any_dtype=True)
