"""The default engine: a decode loop on a transformers model.

A sample depends on (seed, update, row, sample number) alone, not on how rows are batched or spread over ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lit_ppo.functional import token_logprobs
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
    """Sample one response per row; see :class:`lit_ppo.generation.engine.Engine`.

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
    responses = Responses([[] for _ in prompt_ids], [[] for _ in prompt_ids], [])
    draws = None if seeds is None else uniforms(seeds, int(config.max_new_tokens))

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
    stops = stop_ids(config)
    responses.ended.extend(row[-1] in stops for row in responses.ids)
    return responses


def uniforms(seeds: Sequence[Seed], n: int) -> Tensor:
    """One uniform random number per token, computed from the row's seed alone.

    Shapes:
        -> (B, n) float64 in [0, 1).
    """
    drawn = [np.random.default_rng(seed).random(n) for seed in seeds]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, n, dtype=torch.float64)


def stop_ids(config: GenerationConfig) -> list[int]:
    """The tokens that end a response."""
    ids = config.eos_token_id
    return [int(i) for i in (ids if isinstance(ids, list | tuple) else [ids]) if i is not None]


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
