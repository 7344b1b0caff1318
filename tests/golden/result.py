"""What is recorded of a job: the metrics of each update, and the final weights as a hash and in a few numbers."""

import hashlib
import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.helpers.toys import MemoryLogger

OF_THE_CLOCK = ("time/", "throughput/", "memory/")

Result = dict[str, Any]
"""``updates``: what was logged, by step; ``sha256`` of the final weights; ``weights``: three numbers of each."""


class Rows(MemoryLogger):
    """Keeps what was logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        kept = {name: float(value) for name, value in metrics.items() if not name.startswith(OF_THE_CLOCK)}
        self.steps.setdefault(step or 0, {}).update(kept)


def result(module: L.LightningModule, trainer: L.Trainer) -> Result:
    """What is recorded of a run that has ended; collective where weights are sharded."""
    named = {name: _full(p) for name, p in sorted(module.named_parameters()) if _is_result(module, name, p)}
    digest = hashlib.sha256()
    for tensor in named.values():
        digest.update(tensor.numpy().tobytes())
    logger: Any = trainer.logger
    updates = [{"step": step, **row} for step, row in sorted(logger.steps.items())]
    return {"updates": updates, "sha256": digest.hexdigest(), "weights": {n: summary(t) for n, t in named.items()}}


def _is_result(module: Any, name: str, parameter: Tensor) -> bool:
    moved = name.startswith("reference.") and module.checkpoint_reference
    return parameter.requires_grad or moved


def _full(parameter: Tensor) -> Tensor:
    full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return full.detach().float().cpu().contiguous()


def summary(tensor: Tensor) -> dict[str, float]:
    """Numbers that hardly depend on rounding, unlike a hash; the last one notices when weights change places."""
    flat = tensor.flatten().double()
    directions = torch.sin(torch.arange(1, len(flat) + 1, dtype=torch.float64) ** 2)
    products = flat * directions
    return {
        "sum": math.fsum(flat.tolist()),
        "norm": math.sqrt(math.fsum((flat * flat).tolist())),
        "projection": math.fsum(products.tolist()),
    }
