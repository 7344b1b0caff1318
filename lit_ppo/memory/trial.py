"""The largest shapes of a run: a rollout, as far as memory goes without its many tokens, and a micro-batch."""

from contextlib import nullcontext
from copy import copy
from math import ceil
from typing import Any

import torch
from torch import Tensor

from lit_ppo.experience import Experience, Minibatch
from lit_ppo.generation.batch import CACHE
from lit_ppo.generation.transformers import row_seeds
from lit_ppo.memory.sampling import distinct_prompts
from lit_ppo.parallel.ranks import n_ranks
from lit_ppo.parallel.sharding import gathered


def largest_rows(module: Any, n_prompts: int, n_prompt: int) -> int:
    """The most responses that this rank samples at once.

    Args:
        module: The LitPPO.
        n_prompts: Prompts of an update, over all ranks.
        n_prompt: Tokens of the longest prompt.
    """
    rows: int = ceil(n_prompts * module.samples_per_prompt / n_ranks())
    limits: dict[str, int | None] = module.rollout_limits
    size, tokens = limits["micro_batch_size"], limits["micro_batch_tokens"]
    length = n_prompt + int(module.generation.max_new_tokens)
    return max(1, min(rows, size or rows, tokens // length if tokens else rows))


@torch.no_grad()
def try_rollout(module: Any, n_prompts: int, n_prompt: int) -> None:
    """Read the longest prompts, then decode tokens beside a cache of full length.

    Args:
        module: The LitPPO.
        n_prompts: Prompts of an update, over all ranks.
        n_prompt: Tokens of each prompt.
    """
    actor, n_new, rows = module.actor, int(module.generation.max_new_tokens), largest_rows(module, n_prompts, n_prompt)
    ids = torch.zeros(rows, n_prompt, dtype=torch.long, device=module.device)
    n_read = distinct_prompts(rows, n_prompts, module.samples_per_prompt, n_ranks())
    ids[:, -1] = torch.arange(rows) % min(n_read, actor.model.config.get_text_config().vocab_size)
    with gathered(actor) if actor.sharded else nullcontext():
        every_token = list(range(actor.model.config.get_text_config().vocab_size))
        _sample(module, ids, eos_token_id=every_token)  # one token; a static cache is made for all
        taken = torch.empty(rows * _cache_bytes(actor.model, n_prompt + n_new), dtype=torch.uint8, device=ids.device)
        _sample(module, ids[:, -1:], eos_token_id=None, max_new_tokens=min(2, n_new))
        del taken


def _sample(module: Any, ids: Tensor, **changes: Any) -> None:
    config = copy(module.generation)
    config.min_new_tokens = config.min_length = None
    for name, value in changes.items():
        setattr(config, name, value)
    seeds = row_seeds((0, "preflight", 0), len(ids), 1)
    module.actor.generate(ids, torch.ones_like(ids, dtype=torch.bool), config, seeds)


def _cache_bytes(model: Any, length: int) -> int:
    """Bytes of keys and values of a row."""
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **last).get(CACHE)
    tensors = [x for layer in getattr(cache, "layers", ()) for x in vars(layer).values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def longest_micro_batch(
    models: Any, n_prompt: int, minibatch_size: int, micro_batch_size: int | None, micro_batch_tokens: int | None
) -> Minibatch:
    """A micro-batch of zeros with as many tokens as any of this rank can have.

    Args:
        models: The actor gives the device, the generation settings the longest response.
        n_prompt: Tokens of the longest prompt.
        minibatch_size: Most rows.
        micro_batch_size: Most rows in a micro-batch, or None.
        micro_batch_tokens: Most tokens in a micro-batch, or None.
    """
    n_new = int(models.generation.max_new_tokens)
    share = ceil(minibatch_size / n_ranks())
    n_rows = micro_batch_size or share
    if micro_batch_tokens is not None:
        n_rows = max(1, micro_batch_tokens // (n_prompt + n_new))
    n_rows = min(n_rows, share)
    device = models.actor.model.device
    prompt = torch.zeros(n_rows, n_prompt, dtype=torch.long, device=device)
    response = torch.zeros(n_rows, n_new, dtype=torch.long, device=device)
    numbers = torch.arange(n_rows, device=device)
    experience = Experience(
        prompts=[""] * n_rows, responses=[""] * n_rows, columns={}, prompt_index=numbers, group=numbers,
        prompt_ids=prompt, prompt_mask=torch.ones_like(prompt, dtype=torch.bool),
        response_ids=response, response_mask=torch.ones_like(response, dtype=torch.bool), ended=numbers < 0,
    )  # fmt: skip
    return Minibatch.of(experience, range(n_rows), "token_mean")
