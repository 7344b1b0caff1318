"""Run a step that works on tensors which stay where they are: compiled if asked for, on CUDA as a graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.fx.experimental import _config as symbolic_shapes
from transformers import CompileConfig, GenerationConfig
from transformers.pytorch_utils import Conv1D

from lit_ppo.parallel.sharding import is_sharded
from lit_ppo.shown import first_line

KINDS = ("cuda",)
"""Kinds of devices that record graphs."""


class Runner:
    """Runs a step; from the third run of a shape on it replays the kernels that the second one recorded.

    The first run of a shape computes a token as any other, and lets libraries allocate what they need. Weights and
    buffers lie elsewhere in every rollout, so a graph serves the rest of one shape in one rollout. Where a graph
    cannot be recorded, the step runs as it is.

    Args:
        step: Reads and writes tensors that stay where they are, and waits for no result.
        model: What the step calls.
        config: Its ``compile_config`` and ``disable_compile`` are read.
        device: Of the tensors.
    """

    def __init__(self, step: Callable[[], Any], model: nn.Module, config: GenerationConfig, device: torch.device):
        self.step = step if config.compile_config is None else _compiled(step, config.compile_config)
        # the hooks of a sharded model wait for streams outside of the graph
        self.records = device.type in KINDS and not config.disable_compile and not is_sharded(model)
        self.device = device
        self.shape: Any = None
        self.graph: Any = None
        self.result: Any = None
        if self.records:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, shape: Any) -> Any:
        """The result of the step; that of a graph is overwritten by the next call.

        Args:
            shape: Names the shapes of all tensors that the step meets.
        """
        if not self.records:
            return self.step()
        if shape != self.shape:
            self.shape, self.graph = shape, None
            return self._aside(self.step)
        if self.graph is None:
            try:
                self.graph = self._aside(self._record)
            except RuntimeError as error:
                self.records = False
                say_once(f"Sampling runs without CUDA graphs: {first_line(error)}")
                return self.step()
        self.graph.replay()
        return self.result

    def _aside(self, function: Callable[[], Any]) -> Any:
        """Run a function on a stream that can be recorded, for which libraries then have prepared themselves."""
        now = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            result = function()
        now.wait_stream(self.stream)
        return result

    def _record(self) -> Any:
        """Recording computes nothing."""
        graph = torch.cuda.CUDAGraph()
        # other threads, such as those of data loaders, may use the device meanwhile
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            self.result = self.step()
        finally:
            graph.capture_end()
        return graph


def _compiled(step: Callable[[], Any], compile_config: CompileConfig) -> Callable[[], Any]:
    options = compile_config.to_dict()
    without_graphs = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}  # the graphs are ours
    options["mode"] = without_graphs.get(options["mode"], options["mode"])
    options["dynamic"] = True if options["dynamic"] is None else options["dynamic"]  # rows, lengths: few are the same
    compiled = torch.compile(step, **options)

    def run() -> Any:
        # "default": prompts are read without compiled code; no duck shapes: a batch of 64 rows stays another number
        # than a head of size 64
        with torch.compiler.set_stance("default"), symbolic_shapes.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return compiled()

    return run


@contextmanager
def cast_for_compiled_code(model: Any, config: GenerationConfig, device: torch.device) -> Iterator[None]:
    """Hold the weights of linear layers in autocast's dtype: compiled code would cast them for every token.

    The head has its own copy, and embeddings that share its weight stay as they are.
    """
    if config.compile_config is None or not torch.is_autocast_enabled(device.type) or is_sharded(model):
        yield
        return
    dtype, head = torch.get_autocast_dtype(device.type), model.get_output_embeddings()
    layers = [part for part in model.modules() if isinstance(part, nn.Linear | Conv1D) and part is not head]
    before = {p: p.data for layer in layers for p in layer.parameters(recurse=False) if p.dtype == torch.float32}
    try:
        for parameter, weight in before.items():
            parameter.data = weight.to(dtype)
        yield
    finally:
        for parameter, weight in before.items():
            parameter.data = weight


@cache
def say_once(text: str) -> None:
    """Say something in the first of the rollouts only."""
    rank_zero_info(text)
