"""Compiled code for decoding. One graph serves all blocks of a model, so that it compiles in seconds, not minutes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes
from transformers import CompileConfig, GenerationConfig
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from lit_ppo.device import autocast_dtype
from lit_ppo.generation.capture import say_once
from lit_ppo.parallel.sharding import blocks, is_sharded


class OneLayer(Cache):
    """The cache as one block sees it: its own layer, whatever its number, which compiled code would not share."""

    layers: list[Any]

    def __init__(self, layer: Any) -> None:
        super().__init__([layer])

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
        return self.layers[0].update(key_states, value_states)

    def get_seq_length(self, *_: Any, **__: Any) -> Any:
        return self.layers[0].get_seq_length()


def compiled(function: Callable[..., Any], config: GenerationConfig) -> Callable[..., Any]:
    """A function as compiled code, for tensors of any shape; itself if ``config`` has no ``compile_config``."""
    if config.compile_config is None:
        return function
    code = torch.compile(function, **_options(config.compile_config))

    def run(*args: Any, **kwargs: Any) -> Any:
        # no duck shapes: a batch of 64 rows stays another number than a head of size 64
        with symbolic_shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return code(*args, **kwargs)

    return run


def _options(compile_config: CompileConfig) -> dict[str, Any]:
    options = compile_config.to_dict()
    without_graphs = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}  # the graphs are ours
    options["mode"] = without_graphs.get(options["mode"], options["mode"])
    options["dynamic"] = True if options["dynamic"] is None else options["dynamic"]  # rows, lengths: few are the same
    return options


@contextmanager
def compiled_blocks(model: nn.Module, cache: Cache, config: GenerationConfig) -> Iterator[None]:
    """Inside this, the blocks of a model that write into one layer of a cache run as compiled code.

    Args:
        model: Causal LM.
        cache: What it is called with.
        config: Its ``compile_config`` is read.
    """
    found = [] if config.compile_config is None else [(block, _layer_of(block)) for block in blocks(model)]
    before = {block: dict(vars(block)) for block, number in found if number is not None}
    if config.compile_config is not None and not before:
        say_once(f"{type(model).__name__}: only the choice of a token is compiled; no block has one layer of the cache")
    code = compiled(_call, config)
    try:
        for block, number in found:
            if number is not None:
                vars(block)["forward"] = partial(_forward, code, block.forward, OneLayer(cache.layers[number]))
        yield
    finally:
        for block, attributes in before.items():
            vars(block).pop("forward")
            vars(block).update(attributes)


def _layer_of(block: nn.Module) -> int | None:
    """The layer of the cache that a block writes into; None: several, or none."""
    numbers: set[Any] = {getattr(part, "layer_idx", None) for part in block.modules()} - {None}
    return numbers.pop() if len(numbers) == 1 else None


def _call(forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _forward(code: Callable[..., Any], forward: Callable[..., Any], layer: OneLayer, *args: Any, **kwargs: Any) -> Any:
    args = tuple(layer if isinstance(value, Cache) else value for value in args)
    kwargs = {name: layer if isinstance(value, Cache) else value for name, value in kwargs.items()}
    # a block's number, which its attention hands on to the cache, then is no reason to compile again
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        return code(forward, args, kwargs)


@contextmanager
def cast_for_compiled_code(model: Any, config: GenerationConfig, device: torch.device) -> Iterator[None]:
    """Hold the weights of linear layers in autocast's dtype: compiled code would cast them for every token.

    The head has its own copy, and embeddings that share its weight stay as they are.
    """
    dtype, head = autocast_dtype(device.type), model.get_output_embeddings()
    if config.compile_config is None or dtype is None or is_sharded(model):
        yield
        return
    layers = [part for part in model.modules() if isinstance(part, nn.Linear | Conv1D) and part is not head]
    before = {p: p.data for layer in layers for p in layer.parameters(recurse=False) if p.dtype == torch.float32}
    try:
        for parameter, weight in before.items():
            parameter.data = weight.to(dtype)
        yield
    finally:
        for parameter, weight in before.items():
            parameter.data = weight
