"""The default engine: a decode loop on a transformers model.

A sample depends on (seed, update, row, sample number) alone, not on how rows are batched or spread over ranks.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_ppo.functional import token_logprobs
from lit_ppo.generation.config import stop_ids
from lit_ppo.generation.engine import Progress, Responses


def uniforms(seed: int, stream: str, update: int, rows: Sequence[int], samples: Sequence[int], n: int) -> Tensor:
    """One uniform random number per token, computed from counters alone.

    Args:
        seed: The run's.
        stream: Name of an independent stream, such as "train".
        update: Count of training rollouts so far.
        rows: Each row's prompt number in the global batch.
        samples: Each row's sample number for that prompt.
        n: Numbers a row.

    Shapes:
        -> (B, n) float64 in [0, 1).
    """
    key = [seed, zlib.crc32(stream.encode()), update]
    drawn = [np.random.default_rng([*key, row, number]).random(n) for row, number in zip(rows, samples, strict=True)]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, n, dtype=torch.float64)


def generate(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    config: GenerationConfig,
    draws: Tensor | None,
    *,
    logprobs: bool = False,
    progress: Progress | None = None,
) -> Responses:
    """Sample one response per row; see :class:`lit_ppo.generation.engine.Engine`.

    Args:
        model: Causal LM in eval mode.
        prompt_ids: Left-padded.
        prompt_mask: True at prompt tokens.
        config: From :func:`lit_ppo.generation.config.generation_config`.
        draws: Uniform random numbers, one per token; None: greedy.
        logprobs: Also return the tokens' log-probs, at the temperature but before any other logits processor.
        progress: Told how many tokens the longest response has.

    Shapes:
        prompt_ids, prompt_mask (B, P), draws (B, max_new_tokens).
    """
    responses = Responses([[] for _ in prompt_ids], [[] for _ in prompt_ids])

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **state: Any,
    ) -> None:
        _decode(model, input_ids, logits_processor, config, draws, responses, logprobs, progress, state)

    with _weights_cast_once(model, prompt_ids.device.type):
        model.generate(  # type: ignore[operator]
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long(),
            generation_config=GenerationConfig(**{**config.to_dict(), "do_sample": draws is not None}),
            custom_generate=decode,
        )
    return responses


@contextmanager
def _weights_cast_once(model: nn.Module, device: str) -> Iterator[None]:
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


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    config: GenerationConfig,
    draws: Tensor | None,
    responses: Responses,
    logprobs: bool,
    progress: Progress | None,
    state: dict[str, Any],
) -> None:
    """Decode token by token; rows that have ended leave the batch and the cache."""
    rows = torch.arange(len(input_ids), device=input_ids.device)
    stops = torch.tensor(stop_ids(config), device=input_ids.device)
    draws = None if draws is None else draws.to(input_ids.device, _cdf_dtype(input_ids.device))
    tokens, tokens_logprobs, alive_at = [], [], []
    outputs = model._prefill(input_ids, config, state, is_first_iteration=True)
    for t in range(config.max_new_tokens):
        state = model._update_model_kwargs_for_generation(outputs, state)
        raw = outputs.logits[:, -1].float()
        logits = logits_processor(input_ids, raw)
        if progress is not None:
            progress.detail = f"token {t + 1}/{config.max_new_tokens}"
        token = logits.argmax(-1) if draws is None else inverse_cdf(logits, draws[rows, t])
        tokens.append(token)
        if logprobs:
            tokens_logprobs.append(token_logprobs(raw.unsqueeze(1), token.unsqueeze(1), config.temperature).squeeze(1))
        alive_at.append(rows)
        going = ~torch.isin(token, stops)
        input_ids = torch.cat([input_ids, token.unsqueeze(1)], dim=1)
        if t + 1 == config.max_new_tokens or not going.any():
            break
        if not going.all():
            rows, input_ids = rows[going], input_ids[going]
            state["past_key_values"].batch_select_indices(going)
            state = _keep_rows(state, going)
            for processor in logits_processor:  # some hold one number per row
                for name, value in _keep_rows(vars(processor), going).items():
                    setattr(processor, name, value)
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **state)
        outputs = model(**inputs, return_dict=True)
    alive = torch.cat(alive_at).tolist()
    for row, token_id in zip(alive, torch.cat(tokens).tolist(), strict=True):
        responses.ids[row].append(token_id)
    if logprobs:
        for row, logprob in zip(alive, torch.cat(tokens_logprobs).tolist(), strict=True):
            responses.logprobs[row].append(logprob)


def inverse_cdf(logits: Tensor, draws: Tensor) -> Tensor:
    """The token at which the cumulative probability exceeds the draw.

    Shapes:
        logits (B, V), draws (B,) in [0, 1) -> (B,).
    """
    cdf = torch.softmax(logits, dim=-1).cumsum(-1, dtype=draws.dtype)
    position = torch.searchsorted(cdf, (draws * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return position.clamp(max=logits.shape[-1] - 1)


def _cdf_dtype(device: torch.device) -> torch.dtype:
    """Many small probabilities are summed in double precision, where the device supports it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _keep_rows(state: dict[str, Any], going: Tensor) -> dict[str, Any]:
    """Cut tensors with one entry per row to the rows that have not ended."""
    return {
        name: value[going] if isinstance(value, Tensor) and value.ndim and len(value) == len(going) else value
        for name, value in state.items()
    }


def pad_ids(rows: Sequence[Sequence[int]], *, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids padded with 0, and the mask that tells tokens from padding.

    Shapes:
        -> (B, L), (B, L).
    """
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ones = [torch.ones_like(row, dtype=torch.bool) for row in tensors]
    side = "left" if left else "right"
    ids = pad_sequence(tensors, batch_first=True, padding_side=side)
    return ids.to(device), pad_sequence(ones, batch_first=True, padding_side=side).to(device)


def continuations(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[list[int]], response_ids: list[list[int]]
) -> list[str]:
    """Responses as they continue their prompts: decoded alone, many tokenizers drop the leading space."""

    def decode(rows: list[list[int]]) -> list[str]:
        texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return texts

    prompts = decode(prompt_ids)
    conversations = decode([prompt + response for prompt, response in zip(prompt_ids, response_ids, strict=True)])
    return [
        text[len(prompt) :] if text.startswith(prompt) else alone
        for text, prompt, alone in zip(conversations, prompts, decode(response_ids), strict=True)
    ]
