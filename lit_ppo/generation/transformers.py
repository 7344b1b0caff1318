"""The default engine: a decode loop on a transformers model.

A sample depends on (seed, update, row, sample number) alone, not on how rows are batched or spread over ranks.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import ALL_CACHE_NAMES

from lit_ppo.attention.autocast import hold_in_float32
from lit_ppo.device import exact_device
from lit_ppo.functional import float32_linear, inverse_cdf, rounded, token_logprobs
from lit_ppo.generation import static
from lit_ppo.generation.batch import BY_LOGITS, CACHE, Batch, process_in_place
from lit_ppo.generation.engine import Progress, Responses, Seed


def generate(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    config: GenerationConfig,
    seeds: Sequence[Seed] | None,
    *,
    logprobs: bool = False,
    progress: Progress | None = None,
) -> Responses:
    """Sample one response per row; see :class:`lit_ppo.generation.engine.Decoder`.

    Args:
        model: Causal LM in eval mode.
        prompt_ids: Left-padded.
        prompt_mask: True at prompt tokens.
        config: From :func:`lit_ppo.generation.config.generation_config`.
        seeds: One per row; None: greedy.
        logprobs: Also return the tokens' log-probs, at the temperature but before any other logits processor.
        progress: Told how many tokens the longest response has.

    Shapes:
        prompt_ids, prompt_mask (B, P).
    """
    draws = None if seeds is None else uniforms(seeds, int(config.max_new_tokens))
    return sample(model, prompt_ids, prompt_mask, config, draws, logprobs=logprobs, progress=progress)


def sample(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    config: GenerationConfig,
    draws: Tensor | None,
    *,
    logprobs: bool = False,
    progress: Progress | None = None,
) -> Responses:
    """As :func:`generate`, with the random numbers (B, max_new_tokens) instead of seeds; None: greedy."""
    sampled: list[Responses] = []

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **state: Any,
    ) -> None:
        named = [] if config.eos_token_id is None else config.eos_token_id
        stops = torch.as_tensor(named, dtype=torch.long, device=input_ids.device).reshape(-1)
        numbers = None if draws is None else draws.to(exact_device(input_ids.device))
        batch = Batch(
            model, input_ids, prompt_mask.bool(), logits_processor, config, numbers, stops, logprobs, progress
        )
        sampled.append(_decode(batch, generation_config, state))

    with weights_cast_once(model, prompt_ids.device.type), float32_logits(model, prompt_ids.device.type):
        call_generate(model, prompt_ids, prompt_mask, config, decode, do_sample=draws is not None)
    return sampled[0]


def call_generate(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    config: GenerationConfig,
    decode: Callable[..., None],
    *,
    do_sample: bool = True,
) -> None:
    """Let transformers prepare cache and logits processors, then call ``decode`` with them.

    The checkpoint's own generation settings take no part: transformers would fill every unset field from them.

    Args:
        model: Causal LM.
        prompt_ids: Left-padded.
        prompt_mask: True at prompt tokens.
        config: From :func:`lit_ppo.generation.config.generation_config`.
        decode: Gets what transformers hands to a ``custom_generate``.
        do_sample: False: greedy.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    config = copy(config)
    config.do_sample = do_sample
    config.cache_implementation = config.compile_config = None  # prompts are read into a cache of their size
    if not do_sample:  # transformers warns about settings that only sampling reads
        config.top_k = config.temperature = None
    try:
        model.generate(  # type: ignore[operator]
            input_ids=prompt_ids, attention_mask=prompt_mask.long(), generation_config=config, custom_generate=decode
        )
    finally:
        model.generation_config = own


def row_seeds(stream: tuple[int, str, int], n_prompts: int, samples_per_prompt: int) -> list[Seed]:
    """The seeds of all rows: a sample depends on them alone, not on how rows are batched or spread over ranks."""
    seed, name, update = stream
    key = (seed, zlib.crc32(name.encode()), update)
    return [(*key, prompt, sample) for prompt in range(n_prompts) for sample in range(samples_per_prompt)]


def uniforms(seeds: Sequence[Seed], n: int) -> Tensor:
    """One uniform random number per token, computed from the row's seed alone.

    Shapes:
        -> (B, n) float64 in [0, 1).
    """
    drawn = [np.random.default_rng(seed).random(n) for seed in seeds]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, n, dtype=torch.float64)


@contextmanager
def weights_cast_once(model: nn.Module, device: str) -> Iterator[None]:
    """Cast the weights once for all tokens: Lightning's autocast would cast them again in every forward."""
    if not torch.is_autocast_enabled(device):
        yield
        return
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=True):
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)  # autocast caches no others; gradients are off
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            torch.clear_autocast_cache()  # the weights change before the next rollout


@contextmanager
def float32_logits(model: Any, device: str) -> Iterator[None]:
    """Sum the head's products in float32, as training does: bf16 logits are those of another distribution."""
    head = model.get_output_embeddings()
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if type(head) is not nn.Linear or (dtype := autocast or head.weight.dtype).itemsize >= 4:
        yield
        return
    weight = rounded(head.weight.detach(), dtype)

    def forward(states: Tensor) -> Any:
        logits = float32_linear(states.flatten(0, -2), weight, head.bias, dtype, is_rounded=True)
        return logits.unflatten(0, states.shape[:-1])

    before = dict(vars(head))  # a head that sums in float32 for training, too, has a forward of its own
    vars(head)["forward"] = forward
    try:
        yield
    finally:
        del vars(head)["forward"]
        vars(head).update(before)


def _decode(batch: Batch, generation_config: Any, state: dict[str, Any]) -> Responses:
    """Read the prompts, each distinct one once, and go on from them with one of the two loops."""
    read, prompts = batch.input_ids, None
    if can_be_cut(state) and (found := _distinct(read, batch.mask)) is not None:
        first, prompts = (torch.tensor(numbers, device=read.device) for numbers in found)
        read = read[first]
    prompts_state = state if prompts is None else {**state, **_rows_of(state, first, len(batch.input_ids))}
    outputs = batch.model._prefill(read, generation_config, prompts_state, is_first_iteration=True)
    if asks_for_static(batch.config, read.device.type) and static.fits(batch.model, outputs.get(CACHE), state):
        rows = torch.arange(len(read), device=read.device) if prompts is None else prompts
        return static.decode(batch, outputs.logits[:, -1].float(), outputs[CACHE], rows, state)
    if prompts is not None:
        outputs[CACHE].batch_select_indices(prompts)
        outputs.logits = outputs.logits[:, -1:][prompts]
    return _decode_growing(batch, outputs, state)


def asks_for_static(config: GenerationConfig, kind: str) -> bool:
    """Whether rows are sampled on a static cache, if the model's fits.

    Args:
        config: Its ``cache_implementation`` and ``compile_config`` are read.
        kind: Of device.
    """
    if config.cache_implementation is None:
        return kind == "cuda" or config.compile_config is not None
    return bool(config.cache_implementation == "static")


def _distinct(input_ids: Tensor, mask: Tensor) -> tuple[list[int], list[int]] | None:
    """The first row of each distinct prompt, and each row's number among them; None where no prompt comes twice."""
    numbers: dict[bytes, int] = {}
    found = [numbers.setdefault(row.tobytes(), len(numbers)) for row in input_ids.where(mask, -1).cpu().numpy()]
    if len(numbers) == len(found):
        return None
    return [found.index(number) for number in range(len(numbers))], found


def _decode_growing(batch: Batch, outputs: Any, state: dict[str, Any]) -> Responses:
    """Decode token by token; rows that have ended leave the batch and the cache, if the cache can be cut."""
    model, config, draws, input_ids = batch.model, batch.config, batch.draws, batch.input_ids
    if torch.is_autocast_enabled(input_ids.device.type):
        hold_in_float32(outputs.get(CACHE))
    in_batch = rows = torch.arange(len(input_ids), device=input_ids.device)  # rows in the model's batch; still going
    tokens, tokens_logprobs, alive_at = [], [], []
    for t in range(config.max_new_tokens):
        state = model._update_model_kwargs_for_generation(outputs, state)
        raw = outputs.logits[:, -1].float()
        raw = raw if len(in_batch) == len(rows) else raw[rows]
        if len(rows) < len(input_ids) and not all(isinstance(one, BY_LOGITS) for one in batch.processors):
            logits = process_in_place(batch.processors, input_ids, raw, rows)
        else:
            logits = batch.processors(input_ids[rows], raw)
        if batch.progress is not None:
            batch.progress.detail = f"token {t + 1}/{config.max_new_tokens}"
        token = logits.argmax(-1) if draws is None else inverse_cdf(logits, draws[rows.to(draws.device), t])
        tokens.append(token)
        if batch.logprobs:
            tokens_logprobs.append(token_logprobs(raw.unsqueeze(1), token.unsqueeze(1), config.temperature).squeeze(1))
        alive_at.append(rows)
        going = ~torch.isin(token, batch.stops)
        input_ids = torch.cat([input_ids, input_ids[:, -1:].index_put((rows,), token.unsqueeze(1))], dim=1)
        if t + 1 == config.max_new_tokens or not going.any():
            break
        if not going.all():
            rows = rows[going]
            if can_be_cut(state):
                in_batch = rows
                state[CACHE].batch_select_indices(going)
                state |= _rows_of(state, going, len(going))
        inputs = model.prepare_inputs_for_generation(input_ids[in_batch], next_sequence_length=1, **state)
        outputs = model(**inputs, return_dict=True)
    responses = Responses([[] for _ in input_ids], [[] for _ in input_ids], [])
    alive = torch.cat(alive_at).tolist()
    for row, token_id in zip(alive, torch.cat(tokens).tolist(), strict=True):
        responses.ids[row].append(token_id)
    ends = set(batch.stops.tolist())
    responses.ended.extend(ids[-1] in ends for ids in responses.ids)
    if batch.logprobs:
        for row, logprob in zip(alive, torch.cat(tokens_logprobs).tolist(), strict=True):
            responses.logprobs[row].append(logprob)
    return responses


def can_be_cut(state: dict[str, Any]) -> bool:
    """Whether all that a model keeps between tokens are keys and values, whose rows can leave."""
    kept = [name for name in ALL_CACHE_NAMES if state.get(name) is not None]
    cache = state.get(CACHE)
    plain = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")  # the last one only in newer transformers
    return kept == [CACHE] and type(cache) is DynamicCache and all(type(x).__name__ in plain for x in cache.layers)


def _rows_of(state: dict[str, Any], rows: Tensor, n: int) -> dict[str, Any]:
    """The tensors with one entry for each of the ``n`` rows, cut to some rows, given by number or mask."""
    return {name: x[rows] for name, x in state.items() if isinstance(x, Tensor) and x.ndim > 1 and len(x) == n}


def continuations(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    response_ids: Sequence[list[int]],
    skip_special_tokens: bool,
) -> list[str]:
    """Responses as they continue their prompts: decoded alone, many tokenizers drop the leading space."""

    def decode(rows: Sequence[list[int]]) -> list[str]:
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        texts: list[str] = tokenizer.batch_decode(list(rows), **options)
        return texts

    prompts = decode(prompt_ids)
    conversations = decode([prompt + response for prompt, response in zip(prompt_ids, response_ids, strict=True)])
    return [
        text[len(prompt) :] if text.startswith(prompt) else alone
        for text, prompt, alone in zip(conversations, prompts, decode(response_ids), strict=True)
    ]
