"""Run a step that works on tensors which stay where they are: on CUDA as a graph."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import GenerationConfig

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
        config: Its ``disable_compile`` is read.
        device: Of the tensors.
    """

    def __init__(self, step: Callable[[], Any], model: nn.Module, config: GenerationConfig, device: torch.device):
        self.step = step
        # the hooks of a sharded model wait for streams outside of the graph
        self.records = device.type in KINDS and not config.disable_compile and not is_sharded(model)
        self.device = device
        self.shape: Any = None
        self.graph: Any = None  # lives until the next one is recorded: PyTorch drops a pool with its last graph
        self.current = False  # the graph is that of the shape
        self.result: Any = None
        if self.records:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), side_stream(device)

    def __call__(self, shape: Any) -> Any:
        """The result of the step; that of a graph is overwritten by the next call.

        Args:
            shape: Names the shapes of all tensors that the step meets.
        """
        if not self.records:
            return self.step()
        if shape != self.shape:
            self.shape, self.current = shape, False
            return self._aside(self.step)
        if not self.current:
            try:
                self.graph, self.current = self._aside(self._record), True
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
        graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[self.stream.device.index]
        before = generator.clone_state()
        try:
            # other threads, such as those of data loaders, may use the device meanwhile
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                self.result = self.step()
            finally:
                graph.capture_end()
        except RuntimeError:
            generator.graphsafe_set_state(before)
            _stop_recording(self.stream.device.index, self.pool)
            raise
        return graph


def _stop_recording(device: int, pool: Any) -> None:
    """Let the device free memory again, which PyTorch forgets where it cannot record (pytorch issue 171263).

    Nor could the device draw a number any more, but for its generator's state of before.
    """
    with suppress(AttributeError, RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


@cache
def side_stream(device: torch.device) -> Any:
    """One stream for all rollouts: cuBLAS keeps 32 MiB for each stream that it has met, for ever."""
    return torch.cuda.Stream(device)


@cache
def say_once(text: str) -> None:
    """Say something in the first of the rollouts only."""
    rank_zero_info(text)
