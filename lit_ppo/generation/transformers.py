"""Prompts to sampled responses: a sample depends on (seed, update, row, sample number), not on how rows are batched."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode

from lit_ppo.functional import token_logprobs

# Everything that reshapes the distribution, switched off: a checkpoint's own settings must not leak in.
NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
}
FILTERS = ("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
ELSEWHERE = {
    "temperature": "it is LitPPO's own argument, since log-probs use it too",
    "do_sample": "training always samples; rollout(do_sample=False) is greedy",
    "max_length": "give max_new_tokens, which does not depend on the prompt",
    "min_length": "give min_new_tokens, which does not depend on the prompt",
    "num_return_sequences": "it is LitPPO's samples_per_prompt",
    "stop_strings": "responses end in a token: give eos_token_id, a list of ids if there are several",
    "use_cache": "sampling needs it",
    "max_time": "it would make samples depend on the clock",
}


def check_generation(generation: dict[str, Any]) -> None:
    """Check what the user asks of generation, before any model is loaded.

    Args:
        generation: Fields of ``transformers.GenerationConfig``.

    Raises:
        ValueError: An unknown field, one that is set elsewhere, or a mode other than sampling.
    """
    known = GenerationConfig().to_dict()
    for name, value in generation.items():
        if name in ELSEWHERE:
            raise ValueError(f"LitPPO(generation={{{name!r}: {value!r}}}): not here; {ELSEWHERE[name]}")
        if name not in known:
            raise ValueError(f"LitPPO(generation={{{name!r}: ...}}): no field of transformers.GenerationConfig")
    max_new_tokens = generation.get("max_new_tokens")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"LitPPO(generation={generation!r}): max_new_tokens must be given, an integer over 0")
    mode = GenerationConfig(**{**NEUTRAL, **generation, "do_sample": True}).get_generation_mode()
    if mode != GenerationMode.SAMPLE:
        raise ValueError(f"LitPPO(generation={generation!r}): asks for {mode.value}; PPO needs plain sampling")


def generation_config(
    generation: dict[str, Any], temperature: float, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """A neutral configuration with the user's fields; of the checkpoint's own, only stop and start ids stay.

    Args:
        generation: The user's fields.
        temperature: The module's, the one source.
        model: Whose checkpoint names the stop ids.
        tokenizer: Pads; and stops, where the checkpoint names no stop id.
    """
    own = model.generation_config
    stop = own.eos_token_id if own is not None and own.eos_token_id is not None else tokenizer.eos_token_id
    ids = {"eos_token_id": stop, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return GenerationConfig(**{**NEUTRAL, **ids, **generation, "do_sample": True, "temperature": temperature})


def stop_ids(config: GenerationConfig) -> list[int]:
    """The tokens that end a response."""
    ids = config.eos_token_id
    return [int(i) for i in (ids if isinstance(ids, list | tuple) else [ids]) if i is not None]


def uniforms(seed: int, stream: str, update: int, rows: Sequence[int], samples: Sequence[int], n: int) -> Tensor:
    """One uniform number a token, from counters alone.

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


def sample(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    config: GenerationConfig,
    draws: Tensor | None,
    logprobs: list[list[float]] | None = None,
    on_token: Callable[[int], None] = lambda number: None,
) -> list[list[int]]:
    """Responses, each up to and with its first stop token.

    Args:
        model: Causal LM in eval mode.
        prompt_ids: Left-padded.
        prompt_mask: True at prompt tokens.
        config: From :func:`generation_config`.
        draws: Uniform numbers (B, max_new_tokens); None is greedy.
        logprobs: An empty list, to be filled with the tokens' log-probs, tempered but before any other processor.
        on_token: Told how many tokens the longest responses have so far.

    Shapes:
        prompt_ids, prompt_mask (B, P) -> B lists of at most max_new_tokens ids.
    """
    responses: list[list[int]] = [[] for _ in range(len(prompt_ids))]
    if logprobs is not None:
        logprobs.extend([] for _ in responses)

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **state: Any,
    ) -> None:
        _decode(model, input_ids, logits_processor, config, draws, responses, logprobs, on_token, state)

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
    """Under Lightning's autocast, which casts all weights again in every forward, cast them once for all tokens."""
    if not torch.is_autocast_enabled(device):
        yield
        return
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=True):
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)  # the cache takes no others; gradients are off
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            torch.clear_autocast_cache()  # the next rollout's weights are others


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    config: GenerationConfig,
    draws: Tensor | None,
    responses: list[list[int]],
    logprobs: list[list[float]] | None,
    on_token: Callable[[int], None],
    state: dict[str, Any],
) -> None:
    """Token by token; rows that have ended leave the batch, and the cache with it."""
    rows = torch.arange(len(input_ids), device=input_ids.device)
    stops = torch.tensor(stop_ids(config), device=input_ids.device)
    draws = None if draws is None else draws.to(input_ids.device, _cdf_dtype(input_ids.device))
    tokens, tokens_logprobs, alive_at = [], [], []
    outputs = model._prefill(input_ids, config, state, is_first_iteration=True)
    for t in range(config.max_new_tokens):
        state = model._update_model_kwargs_for_generation(outputs, state)
        raw = outputs.logits[:, -1].float()
        logits = logits_processor(input_ids, raw)
        on_token(t + 1)
        token = logits.argmax(-1) if draws is None else inverse_cdf(logits, draws[rows, t])
        tokens.append(token)
        if logprobs is not None:
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
            for processor in logits_processor:  # some hold a number per row
                vars(processor).update(_keep_rows(vars(processor), going))
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **state)
        outputs = model(**inputs, return_dict=True)
    alive = torch.cat(alive_at).tolist()
    for row, token_id in zip(alive, torch.cat(tokens).tolist(), strict=True):
        responses[row].append(token_id)
    if logprobs is not None:
        for row, logprob in zip(alive, torch.cat(tokens_logprobs).tolist(), strict=True):
            logprobs[row].append(logprob)


def inverse_cdf(logits: Tensor, draws: Tensor) -> Tensor:
    """The token at which the cumulated probability passes the draw.

    Shapes:
        logits (B, V), draws (B,) in [0, 1) -> (B,).
    """
    cdf = torch.softmax(logits, dim=-1).cumsum(-1, dtype=draws.dtype)
    position = torch.searchsorted(cdf, (draws * cdf[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return position.clamp(max=logits.shape[-1] - 1)


def _cdf_dtype(device: torch.device) -> torch.dtype:
    """Many small probabilities are cumulated in double precision, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _keep_rows(state: dict[str, Any], going: Tensor) -> dict[str, Any]:
    """What tensors say of the rows that go on."""
    return {
        name: value[going] if isinstance(value, Tensor) and value.ndim and len(value) == len(going) else value
        for name, value in state.items()
    }
