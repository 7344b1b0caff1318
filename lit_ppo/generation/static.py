"""The decode loop that waits for the device once in many tokens: what it reads and writes stays where it is.

Rows that have ended go on until the next look at them; what they wrote is cut off. Then the batch shrinks to a half, a
quarter and so on, and attention reads the cache in lengths of a few sizes: so code that was compiled, and the kernels
that a CUDA graph recorded, serve many tokens.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lit_ppo.attention import autocast
from lit_ppo.functional import inverse_cdf, token_logprobs
from lit_ppo.generation.batch import CACHE, Batch, by_logits_alone, process_in_place
from lit_ppo.generation.buffers import GROUPED_SDPA, Buffers
from lit_ppo.generation.capture import Runner, say_once
from lit_ppo.generation.compiled import cast_for_compiled_code, compiled, compiled_blocks
from lit_ppo.generation.engine import Responses

LOOK_EVERY = 16
"""Tokens after which the loop looks which rows have ended."""
LENGTHS = 64
"""Attention reads a multiple of so many tokens, or an eighth of the cache if that is more."""


def fits(model: Any, cache: Any, state: dict[str, Any]) -> bool:
    """Whether this loop can go on after the prompts; says why not. The arguments are those of :func:`why_not`."""
    why = why_not(model, cache, state)
    if why is None and not _agrees(model):
        why = "its logits differ with a static cache"
    if why is not None:
        say_once(f"{type(model).__name__}: samples with cache_implementation 'dynamic', since {why}")
    return why is None


def why_not(model: Any, cache: Any, state: dict[str, Any]) -> str | None:
    """What keeps this loop from going on after the prompts, as far as it can be told without a forward.

    Args:
        model: Causal LM.
        cache: After the prompts.
        state: What ``generate`` of transformers keeps between tokens.
    """
    tensors = {name for name, value in state.items() if isinstance(value, Tensor)}
    layers = getattr(cache, "layers", [])
    plain = {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
    if not getattr(model, "_can_compile_fullgraph", False):
        return "transformers does not run it on a static cache"
    if not layers or not plain or not all(layer.is_initialized for layer in layers):
        return "not every layer keeps keys and values of its own"
    if not tensors <= {"attention_mask", "position_ids", "cache_position"}:
        return f"it reads {', '.join(sorted(tensors))}"
    if _attention(model) is None:
        return f"its attention is {model.config._attn_implementation}; SDPA and eager attention take a static cache"
    return None


_AGREEING: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _agrees(model: Any) -> bool:
    """Compare the first step after two prompts of unequal length with a forward without a cache, once a model."""
    if model not in _AGREEING:
        ids = torch.arange(10, device=model.device).reshape(2, 5) % model.config.get_text_config().vocab_size
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], device=model.device)
        inputs = {"attention_mask": mask, "position_ids": mask.cumsum(1).sub(1).clamp(min=0)}
        if not _reads(model, "position_ids"):
            del inputs["position_ids"]
        expected = model(input_ids=ids, use_cache=False, **inputs).logits[:, -1].float()
        state = {name: value[:, :4] for name, value in inputs.items()} | {"use_cache": True}
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(input_ids=ids[:, :4], **{CACHE: cache}, **state)
        config, stops = GenerationConfig(max_new_tokens=2), ids[0, :0]
        nothing = Batch(model, ids[:, :4], mask[:, :4].bool(), None, config, None, stops, False, None)
        step = Step(nothing, cache, torch.arange(2, device=ids.device), state)
        step.tokens.copy_(ids[:, 4:])
        with heads_in_groups(model):
            found = step.forward()
        spread = (expected - expected.mean(-1, keepdim=True)).abs().max().clamp(min=1e-6)
        tolerance = 1e-3 if step.cache.layers[0].keys.dtype.itemsize >= 4 else 5e-2
        _AGREEING[model] = bool((found - expected).abs().max() / spread < tolerance)
    return _AGREEING[model]


def decode(batch: Batch, logits: Tensor, cache: Cache, prompts: Tensor, state: dict[str, Any]) -> Responses:
    """Sample after the prompts.

    Args:
        batch: Rows to sample.
        logits: Of the first token of each prompt.
        cache: After the prompts; it is emptied.
        prompts: The prompt of each row.
        state: See :func:`fits`.

    Shapes:
        logits (n_prompts, V), prompts (B,).
    """
    longest, n_prompt = int(batch.config.max_new_tokens), batch.input_ids.shape[1]
    step = Step(batch, cache, prompts, state)
    whole = all(map(by_logits_alone, batch.processors))
    going = [True] * len(prompts)
    step.choose(logits[prompts], None if whole else n_prompt)
    n_tokens, seen = 1, 0
    with (
        heads_in_groups(batch.model),
        cast_for_compiled_code(batch.model, batch.config, logits.device),
        compiled_blocks(batch.model, step.cache, batch.config),
    ):
        sample = partial(step, compiled(step.choose, batch.config)) if whole else step.forward
        run = Runner(sample, batch.model, batch.config, logits.device)
        while True:
            going = step.look(going, seen, n_tokens)
            if batch.progress is not None:
                batch.progress.detail = f"token {n_tokens}/{longest}"
            if n_tokens == longest or not any(going):
                return step.responses(n_tokens)
            going = step.shrink(going)
            seen, until = n_tokens, min(n_tokens + LOOK_EVERY, longest)
            shape = step.show(len(going), n_prompt + until - 1)
            for n_tokens in range(seen + 1, until + 1):
                raw = run(shape)
                if not whole:
                    step.choose(raw, n_prompt + n_tokens - 1)


class Step:
    """One token for every row in the model's batch. Nothing here waits for the device, except between the steps.

    Args:
        batch: Rows to sample.
        cache: See :func:`decode`.
        prompts: See :func:`decode`.
        state: See :func:`decode`.
    """

    def __init__(self, batch: Batch, cache: Cache, prompts: Tensor, state: dict[str, Any]) -> None:
        n, n_prompt = batch.input_ids.shape
        longest, device = int(batch.config.max_new_tokens), prompts.device
        self.batch = batch
        self.length = _up(n_prompt + longest - 1, LENGTHS)
        self.stride = max(LENGTHS, _up(self.length // 8, LENGTHS))
        self.cache = Buffers(cache, prompts, self.length, n_prompt)
        # one entry per row
        self.ids = torch.cat([batch.input_ids, batch.input_ids.new_zeros(n, longest)], dim=1)
        self.logprobs = torch.zeros(n, longest if batch.logprobs else 0, device=device)
        self.n_tokens = torch.zeros(1, dtype=torch.long, device=device)
        # one entry per place in the model's batch
        self.all_rows = torch.arange(n, device=device)
        self.all_tokens = batch.input_ids[:, -1:].clone()
        self.all_positions = batch.mask.sum(1, keepdim=True)
        self.all_masks = torch.cat([batch.mask, batch.mask.new_ones(n, self.length - n_prompt)], dim=1)
        self.reads_positions = _reads(batch.model, "position_ids")
        known = ("attention_mask", "position_ids", "cache_position", CACHE)
        self.others = {name: value for name, value in state.items() if name not in known}
        if _reads(batch.model, "cache_position"):  # transformers 5.3
            self.others["cache_position"] = self.cache.position
        self.show(n, self.length)

    def show(self, n: int, length: int) -> tuple[int, int]:
        """Let the next steps work on the first ``n`` places and read at least ``length`` tokens; returns the shape."""
        length = min(_up(length, self.stride), self.length)
        self.cache.show(n, length)
        self.rows, self.tokens, self.positions = self.all_rows[:n], self.all_tokens[:n], self.all_positions[:n]
        self.mask = self.all_masks[:n, :length]
        return n, length

    def __call__(self, choose: Callable[[Tensor], None] | None = None) -> None:
        (choose or self.choose)(self.forward())

    def forward(self) -> Tensor:
        """Logits of the next token, (n, V)."""
        places = {"position_ids": self.positions} if self.reads_positions else {}
        outputs = self.batch.model(
            input_ids=self.tokens, attention_mask=self.mask, **{CACHE: self.cache}, **places, **self.others
        )
        self.cache.position.add_(1)
        self.positions.add_(1)
        logits: Tensor = outputs.logits[:, -1].float()
        return logits

    def choose(self, raw: Tensor, length: int | None = None) -> None:
        """Sample tokens and write them down.

        Args:
            raw: The model's logits, (n, V).
            length: Tokens so far, for processors that read them.
        """
        batch = self.batch
        if length is None or len(raw) == len(self.ids):
            logits = batch.processors(self.ids[:, :length], raw)
        else:
            logits = process_in_place(batch.processors, self.ids[:, :length], raw, self.rows)
        if batch.draws is None:
            token = logits.argmax(-1)
        else:
            rows, column = self.rows.to(batch.draws.device), self.n_tokens.to(batch.draws.device)
            token = inverse_cdf(logits, batch.draws[rows, column])
        self.ids.index_put_((self.rows, batch.input_ids.shape[1] + self.n_tokens), token)
        if batch.logprobs:
            temperature = batch.config.temperature
            found = token_logprobs(raw.unsqueeze(1), token.unsqueeze(1), temperature).squeeze(1)
            self.logprobs.index_put_((self.rows, self.n_tokens), found)
        self.tokens.copy_(token.unsqueeze(1))
        self.n_tokens.add_(1)

    def look(self, going: list[bool], seen: int, n_tokens: int) -> list[bool]:
        """Which rows in the model's batch have not ended; waits for the device.

        Args:
            going: What the look before found.
            seen: Tokens at the look before.
            n_tokens: Tokens now.
        """
        n_prompt = self.batch.input_ids.shape[1]
        written = self.ids[self.rows, n_prompt + seen : n_prompt + n_tokens]
        ended = torch.isin(written, self.batch.stops).any(1).tolist()
        return [was and not now for was, now in zip(going, ended, strict=True)]

    def shrink(self, going: list[bool]) -> list[bool]:
        """Halve the model's batch while all rows that have not ended fit; returns which of its rows these are."""
        n = len(going)
        while (n + 1) // 2 >= sum(going) and n > 2:  # one row would be another shape to compiled code
            n = (n + 1) // 2
        source = [place for place in range(n, len(going)) if going[place]]
        target = [place for place in range(n) if not going[place]][: len(source)]
        if source:
            places = torch.tensor([source, target]).to(self.rows.device)
            for entries in (self.all_rows, self.all_tokens, self.all_positions, self.all_masks):
                entries[places[1]] = entries[places[0]]
            self.cache.move(*places)
        taken = set(target)
        return [going[place] or place in taken for place in range(n)]

    def responses(self, n_tokens: int) -> Responses:
        """What was sampled, up to the first stop token of each row."""
        n_prompt, stops = self.batch.input_ids.shape[1], set(self.batch.stops.tolist())
        ids = self.ids[:, n_prompt : n_prompt + n_tokens].tolist()
        ends = [next((t + 1 for t, token in enumerate(row) if token in stops), n_tokens) for row in ids]
        ids = [row[:end] for row, end in zip(ids, ends, strict=True)]
        logprobs = [row[:end] for row, end in zip(self.logprobs.tolist(), ends, strict=True)]
        return Responses(ids, logprobs, [row[-1] in stops for row in ids])


def _attention(model: Any) -> str | None:
    """The attention of the step: Flash Attention, whose masks have no fixed size, is replaced by SDPA."""
    attention = str(model.config._attn_implementation)
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if attention in ("sdpa", autocast.NAME) or ("flash" in attention and model._supports_sdpa and not capped):
        return GROUPED_SDPA
    return attention if attention == "eager" else None


@contextmanager
def heads_in_groups(model: Any) -> Iterator[None]:
    """Read the cache once for all heads that share it."""
    before = model.config._attn_implementation
    model.config._attn_implementation = _attention(model)
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _reads(model: Any, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
