"""How a model attends, and by which kernel. Each is tried on a few tokens, forward and backward, before it is used."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lit_ppo.attention import kernels
from lit_ppo.attention.kernels import EXTRAS, Kernel
from lit_ppo.attention.windows import layers_of, tells_its_windows
from lit_ppo.device import autocast_dtype, exact_products
from lit_ppo.shown import reason

TOLERANCE = 3e-2  # relative, of a 16-bit kernel against float32
SDPA_BY_NAME = re.compile(r"""_attn_implementation\s*(==|!=|in|not in)[^\n]*["']sdpa["']""")


@dataclass(frozen=True)
class Heads:
    """The sizes of a model's attention."""

    queries: int
    keys: int
    size: int

    @classmethod
    def of(cls, config: Any) -> "Heads":
        """Those of a configuration, of the layer with the widest heads; where it names none, usual ones."""
        return max(map(cls._of_layer, layers_of(config)), key=lambda heads: heads.size)

    @classmethod
    def _of_layer(cls, config: Any) -> "Heads":
        def size(name: str, usual: int) -> int:
            found = getattr(config, name, None)
            return found if isinstance(found, int) and found > 0 else usual

        queries = size("num_attention_heads", 4)
        return cls(
            queries,
            size("num_key_value_heads", queries),
            size("head_dim", size("hidden_size", 64 * queries) // queries),
        )


@dataclass(frozen=True)
class Attention:
    """How a model attends: the attribute ``lit_ppo_attention`` of its backbone."""

    asked: str | None  # a kernel of flash attention that the user has named
    exact: str  # in float32 and on a CPU: sdpa or eager
    packs: bool  # packed rows give what each row gives alone
    heads: Heads

    def kernel(self, backbone: Any, device: torch.device) -> Kernel | None:
        """The kernel for the current precision; None: there is none, or its numbers have too many bits."""
        if not self.packs:
            return None
        dtype = autocast_dtype(device.type) or backbone.dtype
        if dtype not in kernels.DTYPES:
            if not any(isinstance(p, DTensor) for p in backbone.parameters()):
                say_sixteen_bits(self.asked)
                return None
            dtype = torch.bfloat16  # a sharded model may gather its weights in another dtype than their own
        return kernel_for(self.asked, device, dtype, self.heads)


def attend(
    kernel: Kernel,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: tuple[Tensor | None, int],
    window: int | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Attention of a layer by a kernel; None where the layer wants something that the kernel does not do.

    Args:
        kernel: For packed rows.
        module: The layer.
        query: Of the tokens, as are ``key`` and ``value``.
        key: See ``query``.
        value: See ``query``.
        rows: Where each row starts, and the length of the longest.
        window: Tokens that a token sees; None: all before it.
        kwargs: Further arguments of attention in transformers.

    Shapes:
        query (1, heads, N, d), key and value (1, kv_heads, N, d) -> (1, N, heads, d).
    """
    starts, longest = rows
    dtype = autocast_dtype(query.device.type) or query.dtype  # autocast knows SDPA, but no kernel
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    others = kwargs.get("dropout") or kwargs.get("position_bias") is not None or query.shape[-1] != value.shape[-1]
    cannot = others or not causal or not (kernel.any_dtype or dtype in kernels.DTYPES)
    extras = {}
    if kernel.extras is not None:
        extras = {name: kwargs[name] for name in EXTRAS if kwargs.get(name) is not None}
        if extras and (cannot or not extras.keys() <= set(kernel.extras)):
            problem = f"does not take this model's {' and '.join(extras)} in {dtype}; use another attn_implementation"
            raise ValueError(f"attn_implementation={kernel.name!r}: {problem}")
    if cannot:
        return None
    query, key, value = (x.to(dtype).transpose(1, 2)[0] for x in (query, key, value))
    output = kernel.attend(
        query, key, value, starts, longest,
        scale=kwargs.get("scaling"), window=None if window is None or window >= longest else window, **extras,
    )  # fmt: skip
    return output.unsqueeze(0)


@cache
def kernel_for(asked: str | None, device: torch.device, dtype: torch.dtype, heads: Heads) -> Kernel | None:
    """The kernel to use, tried once; says which one, or why there is none.

    Args:
        asked: ``attn_implementation`` of transformers that the user has named; None: what is installed.
        device: Where the tokens are.
        dtype: Of queries.
        heads: Of the model.

    Raises:
        ValueError: The one that was asked for does not work.
    """
    problems = []
    candidates = kernels.installed() if asked is None else [(asked, partial(kernels.flash, asked))]
    for name, load in candidates:
        try:
            kernel = load()
            _try(kernel, device, dtype, heads)
        except Exception as error:  # whatever a kernel raises, there is another way
            problems.append(f"{name}: {reason(error, 200)}")
            continue
        _say(f"attention over packed rows by {kernel.name}")
        return kernel if asked is not None else replace(kernel, extras=None)
    if asked is not None:
        raise ValueError(
            f"attn_implementation={asked!r}: does not work on this device ({problems[0]}); leave it out, and one that "
            "works is chosen"
        )
    tried = f" ({'; '.join(problems)})" if problems else ", since no kernel for packed rows is installed"
    _say(f"attention over rows side by side, padded, by SDPA{tried}")
    return None


def say_sixteen_bits(asked: str | None) -> None:
    """Say why no kernel is used where queries have 32 bits."""
    name = "kernels for packed rows" if asked is None else repr(asked)
    _say(f"attention over rows side by side, padded: {name} take 16-bit numbers only; use precision='bf16-mixed'")


@cache
def _say(text: str) -> None:
    rank_zero_info(f"LitPPO: {text}")


def _try(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: Heads) -> None:
    """Compare output and gradients on rows of three lengths with those of plain torch in float32.

    Raises:
        RuntimeError: They differ, or whatever the kernel raises.
    """
    for window in (None, 16):
        found = _output_and_gradients(kernel.attend, device, dtype, dtype, heads, window)
        expected = _output_and_gradients(kernels.plain, device, dtype, torch.float32, heads, window)
        for name, ours, exact in zip(("output", "d query", "d key", "d value"), found, expected, strict=True):
            off = float((ours.float() - exact).norm() / exact.norm())
            if not off < TOLERANCE:
                what = "" if window is None else f" with a window of {window}"
                raise RuntimeError(f"its {name}{what} is off by {off:.0%}")


def _output_and_gradients(
    function: kernels.Attend,
    device: torch.device,
    rounded: torch.dtype,
    dtype: torch.dtype,
    heads: Heads,
    window: int | None,
) -> list[Tensor]:
    lengths = torch.tensor([3, 70, 20])
    n, starts = int(lengths.sum()), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        tensors = [
            _numbers(n, count, heads.size, i).to(device, rounded).to(dtype).requires_grad_()
            for i, count in enumerate((heads.queries, heads.keys, heads.keys))
        ]
        output = function(*tensors, starts, int(lengths.max()), scale=None, window=window)
        weights = _numbers(n, heads.queries, heads.size, 3).to(device, rounded).to(dtype)
        return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]


def _numbers(n: int, heads: int, size: int, seed: int) -> Tensor:
    """Numbers that look random, without a draw: random states stay as they are."""
    return torch.arange(1, n * heads * size + 1).mul(0.731 + 0.17 * seed).sin().mul(97.0).sin().view(n, heads, size)


def supports_sdpa(model: PreTrainedModel) -> bool:
    """Whether SDPA computes the model's attention; it would ignore a limit of the logits."""
    return model._supports_sdpa and getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is None


def takes_packing(model: PreTrainedModel) -> bool:
    """Whether a model hands arguments and positions on to its attention, and tells it its windows."""
    parameters = inspect.signature(model.base_model.forward).parameters
    takes_arguments = "position_ids" in parameters and any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    return takes_arguments and mixes(model) is None


def mixes(model: PreTrainedModel) -> str | None:
    """Why tokens of packed rows would mix, or see others than those in their windows; None: they would not."""
    if not only_attends(model):
        return "some of its layers are of another kind"
    return None if tells_its_windows(model) else "only its mask knows its sliding window"


def only_attends(model: PreTrainedModel) -> bool:
    """Whether tokens meet in attention alone, to all before or to those in a window: no convolutions, no chunks.

    And in one that can be replaced, see :func:`asks_for_sdpa`.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return not set(kinds) - {"full_attention", "sliding_attention"} and not asks_for_sdpa(model)


def asks_for_sdpa(model: nn.Module) -> bool:
    """Whether layers do something else when their attention is not called ``sdpa``, and so need that name.

    Falcon then attends by code of its own, and models with sparse attention (DeepSeek-V3.2) drop their mask, which only
    rows longer than the mask would show.
    """
    layers = {type(module) for module in model.modules() if not isinstance(module, PreTrainedModel)}
    return any(map(_compares_with_sdpa, {own for layer in layers for own in layer.__mro__}))


@cache
def _compares_with_sdpa(layer: type) -> bool:
    if layer.__module__.split(".")[0] in ("torch", "builtins"):
        return False
    try:
        source = inspect.getsource(layer)
    except (OSError, TypeError):  # not at hand: nothing is known of it
        return True
    return SDPA_BY_NAME.search(source) is not None


def packs_faithfully(model: PreTrainedModel, packed: Callable[..., dict[str, Any]], alone: str | None = None) -> bool:
    """Compare two rows packed with each of them alone.

    Args:
        model: Attends by packed attention.
        packed: What it reads of ids and mask.
        alone: How it attends to the rows alone; None: as it attends now.
    """
    backbone, device = model.base_model, model.device
    ids = torch.arange(6, device=device).view(2, 3) % model.config.get_text_config().vocab_size
    mask = torch.tensor([[False, True, True], [True, True, True]], device=device)
    with torch.no_grad(), exact_products():
        try:
            together = backbone(**packed(ids, mask), use_cache=False).last_hidden_state[0]
        except (TypeError, RuntimeError):  # a family that hands nothing on to its attention
            return False
        if alone is not None:
            model.config._attn_implementation = alone
        expected = [
            backbone(input_ids=row.unsqueeze(0), use_cache=False).last_hidden_state[0] for row in (ids[0, 1:], ids[1])
        ]
    tolerance = 1e-4 if together.dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(together.float(), torch.cat(expected).float(), rtol=tolerance, atol=tolerance)
