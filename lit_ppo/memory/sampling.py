"""Sampling, traced on tensors without storage, with the cache that the device and ``generation`` choose.

Call :func:`trace_rollout` where tensors have no storage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from lit_ppo.attention.autocast import hold_in_float32
from lit_ppo.engines.vllm import VLLMEngine
from lit_ppo.functional import inverse_cdf
from lit_ppo.generation import static
from lit_ppo.generation.batch import CACHE, Batch
from lit_ppo.generation.compiled import cast_for_compiled_code
from lit_ppo.generation.config import neutral
from lit_ppo.generation.transformers import asks_for_static, can_be_cut, float32_logits, weights_cast_once
from lit_ppo.memory.job import Job
from lit_ppo.memory.live import Live


@dataclass(frozen=True)
class RolloutTrace:
    """Bytes of sampling, on top of the weights."""

    cast: int  # bfloat16 copies of weights, made once
    cache: int  # keys and values at the last token
    tokens: int  # of each row, for which the cache has room
    peaks: tuple[int, int, int]  # while prompts are read, while they are copied, at the last token; with the cache

    @property
    def workspace(self) -> int:
        """Of the highest point, on top of the cache."""
        return max(self.peaks) - self.cache


def resolved(module: Any, job: Job) -> GenerationConfig:
    """How a LitPPO samples, before it has built its models, with the cache that the devices choose."""
    config = neutral(**module.model_settings.generation, temperature=module.temperature)
    config.cache_implementation = "static" if asks_for_static(config, "cuda" if job.on_gpu else "cpu") else "dynamic"
    if job.n_shards > 1:  # compiled code does not hold shards in another dtype
        config.compile_config = None
    return config


def distinct_prompts(rows: int, n_prompts: int, samples_per_prompt: int, n_ranks: int) -> int:
    """The most prompts that rows sampled at once can have. Ranks take rows in turns.

    Args:
        rows: Of one rank.
        n_prompts: Of an update.
        samples_per_prompt: Responses to each.
        n_ranks: Of the run.

    >>> distinct_prompts(32, 8, 4, 1), distinct_prompts(5, 7, 3, 1), distinct_prompts(8, 8, 4, 4)
    (8, 3, 8)
    """
    begun = ceil((rows * n_ranks - 1) / samples_per_prompt) + 1  # the first may have been begun before
    if rows * n_ranks % samples_per_prompt == 0:
        begun = rows * n_ranks // samples_per_prompt
    return min(rows, n_prompts, begun)


def trace_rollout(
    model: Any, rows: int, prompts: int, n_prompt: int, config: GenerationConfig, autocast: torch.dtype | None
) -> RolloutTrace:
    """Sampling of responses that all have their full length.

    Args:
        model: The causal LM.
        rows: Responses sampled at once.
        prompts: Different ones, each of which is read once.
        n_prompt: Tokens of each prompt.
        config: From :func:`resolved`.
        autocast: Dtype of the products; None: that of the weights.
    """
    last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}

    def read(rows: int, n: int, length: int, **state: Any) -> Any:
        """A forward of ``n`` tokens after which the cache has ``length``."""
        ids, mask = torch.zeros(rows, n, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)
        return model(input_ids=ids, attention_mask=mask, use_cache=True, **last, **state)

    new = int(config.max_new_tokens)
    with torch.no_grad(), _sampling(model, autocast) as live:
        cut = can_be_cut({CACHE: read(1, 1, 1).get(CACHE)})
        cast = live.now
        ids, mask = torch.zeros(rows, n_prompt, dtype=torch.long), torch.ones(rows, n_prompt, dtype=torch.bool)
        prompt, draws = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, new, dtype=torch.float64)
        live.forget_peak()
        outputs = read(prompts if cut else rows, n_prompt, n_prompt)
        reading = live.peak - cast
        live.forget_peak()
        if config.cache_implementation == "static" and static.why_not(model, outputs.get(CACHE), {}) is None:
            batch = Batch(model, ids, mask, _unchanged, config, draws, ids[0, :0], logprobs=False, progress=None)
            logits = outputs.logits[:, -1].float()
            step = static.Step(batch, outputs[CACHE], prompt, {})
            step.choose(logits[prompt])
            copying = live.peak - cast
            live.forget_peak()
            with static.heads_in_groups(model), cast_for_compiled_code(model, config, logits.device):
                step()
            return RolloutTrace(cast, _bytes(step.cache), step.length, (reading, copying, live.peak - cast))
        if cut and prompts < rows:
            outputs[CACHE].batch_select_indices(prompt)
            outputs.logits = outputs.logits[:, -1:][prompt]
        copying = live.peak - cast
        del outputs
        cache = read(rows, max(n_prompt + new - 1, 1), max(n_prompt + new - 1, 1)).get(CACHE)
        hold_in_float32(cache)
        live.forget_peak()
        raw = read(rows, 1, n_prompt + new, **{CACHE: cache}).logits[:, -1].float()
        inverse_cdf(raw, draws[:, 0])
        return RolloutTrace(cast, _bytes(cache), n_prompt + new, (reading, copying, live.peak - cast))


def notes(module: Any, job: Job) -> list[str]:
    """What the estimate of a rollout leaves out."""
    if module.sampler is not None:
        return [_note(module.sampler.engine)]
    config = resolved(module, job)
    if job.on_gpu and config.cache_implementation == "static" and not config.disable_compile and job.n_shards == 1:
        return [
            "the pool of CUDA graphs is not counted: it keeps the workspace of a step of sampling beside other memory"
        ]
    return []


def _note(engine: Any) -> str:
    if isinstance(engine, VLLMEngine) and engine.local is not None:
        share = engine.local.gpu_memory_utilization
        return (
            f"VLLMEngine(gpu_memory_utilization={share}): vLLM takes up to {share:.0%} of each card while it samples, "
            "which is not counted: what is held must fit beside it"
        )
    return f"{type(engine).__name__} samples elsewhere: its memory is not counted"


def _bytes(cache: Any) -> int:
    """Of keys and values, or of what else a model keeps."""
    tensors = [x for layer in getattr(cache, "layers", ()) for x in vars(layer).values() if isinstance(x, Tensor)]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def _unchanged(_: Tensor, logits: Tensor) -> Tensor:
    return logits


@contextmanager
def _sampling(model: nn.Module, autocast: torch.dtype | None) -> Iterator[Any]:
    with Live([*model.parameters(), *model.buffers()]) as live:
        if autocast is None:
            with float32_logits(model, "cpu"):
                yield live
        else:
            with torch.autocast("cpu", autocast), weights_cast_once(model, "cpu"), float32_logits(model, "cpu"):
                yield live
