"""Sampling alone: tokens per second of ``generate`` and of both loops, and what the memory's bandwidth allows."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.measure import synchronize
from lit_ppo.generation.config import neutral
from lit_ppo.models.actor_critic import Actor


def bandwidth_bound(job: Any, model: nn.Module, bytes_per_second: float) -> float:
    """Tokens per second if every token read the weights once, and the cache of its row, in bf16.

    The cache holds all of the prompt and on average half of the response.

    Args:
        job: Shape of the model, and of what it samples.
        model: What samples.
        bytes_per_second: Of the card's memory.
    """
    weights = sum(p.numel() for p in model.parameters())
    per_token = 2 * job.layers * job.kv_heads * (job.hidden // job.heads)  # keys and values
    cache = job.prompts * per_token * (job.prompt + job.response / 2)
    return job.prompts * bytes_per_second / (2 * (weights + cache))


def measure(job: Any, folder: Path, device: str, bytes_per_second: float, parts: dict[str, Any]) -> dict[str, Any]:
    """Responses of full length to the same prompts, in bf16.

    Args:
        job: Shape of the model, and of what it samples.
        folder: With the model.
        device: Where to sample.
        bytes_per_second: Of the card's memory; NaN if unknown.
        parts: By name, fields of ``generation``; None: ``generate`` of transformers.
    """
    model = AutoModelForCausalLM.from_pretrained(folder / "actor", dtype=torch.bfloat16).to(device)
    actor = Actor(model, checked=True)
    prompts = torch.randint(2, job.vocabulary, (job.prompts, job.prompt), device=device)
    bound = bandwidth_bound(job, model, bytes_per_second)
    found: dict[str, Any] = {"bandwidth_bound": bound}
    for name, fields in parts.items():
        run = _stock(model, prompts) if fields is None else _ours(actor, prompts, fields)
        try:
            found[name] = _timed(run, job, device, bound, compiled="compile_config" in (fields or {}))
        except Exception as error:  # the other parts still count
            found[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
    return found


def _timed(run: Callable[[int], None], job: Any, device: str, bound: float, *, compiled: bool) -> dict[str, float]:
    """A run after a short one, in which libraries prepare themselves; or a full one, which compiles all shapes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for tokens in (job.response if compiled else min(job.response, 8), job.response):
        synchronize()
        start = time.perf_counter()
        run(tokens)
        synchronize()
        seconds.append(time.perf_counter() - start)
    rate = job.prompts * job.response / seconds[1]
    return {
        "first_seconds": seconds[0],
        "seconds": seconds[1],
        "tokens_per_second": rate,
        "of_bandwidth_bound": rate / bound,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
    }


def _stock(model: Any, prompts: torch.Tensor) -> Callable[[int], None]:
    def run(n: int) -> None:
        mask = torch.ones_like(prompts)
        model.generate(prompts, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=n, min_new_tokens=n)

    return run


def _ours(actor: Actor, prompts: torch.Tensor, fields: dict[str, Any]) -> Callable[[int], None]:
    mask, seeds = torch.ones_like(prompts, dtype=torch.bool), [(0, 0, 0, row, 0) for row in range(len(prompts))]

    def run(n: int) -> None:
        with torch.no_grad():
            actor.generate(prompts, mask, neutral(max_new_tokens=n, temperature=1.0, **fields), seeds)

    return run
