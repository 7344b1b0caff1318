"""Everything that ``LitPPO.rollout`` takes as prompts, as one kind of batch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_ppo.data.batch import PromptBatch
from lit_ppo.data.encoding import encode_prompts
from lit_ppo.experience import Experience

ACCEPTED = (
    "give strings, lists of chat messages, rows or a mapping with a column 'prompt', or a mapping with 'input_ids' and "
    "'attention_mask'"
)


def as_batch(prompts: Any, tokenizer: PreTrainedTokenizerBase) -> PromptBatch:
    """A batch of encoded prompts.

    Args:
        prompts: A batch of a ``PromptDataModule``; strings; lists of chat messages; a mapping of columns, or a list of
            rows, with ``prompt`` (either kind) or with ``input_ids`` and ``attention_mask``, whose other columns go to
            the reward; an ``Experience`` (the first row of each group).
        tokenizer: The actor's.

    Raises:
        ValueError: Anything else; names its keys or types.
    """
    if isinstance(prompts, PromptBatch):
        return prompts
    if isinstance(prompts, Experience):
        return _first_of_groups(prompts)
    if isinstance(prompts, Mapping):
        return _of_columns(dict(prompts), tokenizer)
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        _refuse(prompts, "is one prompt" if isinstance(prompts, str) else f"is {type(prompts).__name__}")
    if isinstance(prompts, Tensor):
        _refuse(f"tensor of shape {tuple(prompts.shape)}", "has no mask that tells prompts from padding")
    rows = list(prompts)
    if rows and all(isinstance(row, Mapping) for row in rows):
        return _of_columns(_columns(rows), tokenizer)
    return _encoded(rows, {}, tokenizer)


def _refuse(prompts: object, problem: str) -> NoReturn:
    raise ValueError(f"rollout(prompts={' '.join(str(prompts).split())[:80]}): {problem}; {ACCEPTED}")


def _first_of_groups(experience: Experience) -> PromptBatch:
    first_of_group = {group: row for row, group in reversed(list(enumerate(experience.group.tolist())))}
    first = experience.select(sorted(first_of_group.values()))
    ids = [row[mask].tolist() for row, mask in zip(first.prompt_ids, first.prompt_mask, strict=True)]
    return PromptBatch(first.prompts, ids, first.prompt_index, first.columns)


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns; a row without a value for one has None there, but each row has a prompt."""
    if all({"role", "content"} <= row.keys() for row in rows):
        _refuse(rows, "is one chat prompt")
    names = dict.fromkeys(name for row in rows for name in row)
    for name in {"prompt", "input_ids"} & names.keys():
        lacking = [number for number, row in enumerate(rows) if row.get(name) is None]
        if lacking:
            _refuse(rows[lacking[0]], f"row {lacking[0]} has no {name!r}, others have")
    return {name: [row.get(name) for row in rows] for name in names}


def _of_columns(columns: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PromptBatch:
    keys = ", ".join(map(repr, columns))
    given = [name for name in ("prompt", "input_ids") if name in columns]
    if len(given) != 1:
        _refuse(f"a mapping with {keys}", "has both prompts and their tokens" if given else "has no column of prompts")
    prompts, mask = columns.pop(given[0]), columns.pop("attention_mask", None) if given == ["input_ids"] else None
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        _refuse(f"a mapping with {keys}", f"{given[0]!r} is {type(prompts).__name__}, not one value per prompt")
    prompts = list(prompts)
    for name, values in columns.items():
        count = len(values) if hasattr(values, "__len__") and not isinstance(values, str | Mapping) else None
        if count != len(prompts):
            _refuse(f"a mapping with {keys}", f"{name!r} has {count or 'no'} values for {len(prompts)} prompts")
    others = {name: values.tolist() if hasattr(values, "tolist") else list(values) for name, values in columns.items()}
    if mask is None and given == ["prompt"]:
        return _encoded(prompts, others, tokenizer)
    return _of_tokens(prompts, mask, others, tokenizer)


def _encoded(prompts: list[Any], columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase) -> PromptBatch:
    for number, prompt in enumerate(prompts):
        messages = isinstance(prompt, list | tuple) and prompt and all(_is_message(message) for message in prompt)
        if not isinstance(prompt, str) and not messages:
            _refuse(repr(prompt), f"prompt {number} is neither text nor a list of messages with 'role' and 'content'")
    chat = bool(prompts) and not isinstance(prompts[0], str)
    if chat and "messages" in columns:
        _refuse("a mapping with 'prompt', 'messages'", "chat prompts go to the reward as 'messages'; rename the column")
    texts, ids = encode_prompts(tokenizer, prompts, where="rollout(prompts)")
    columns = {**columns, "messages": prompts} if chat else columns
    return PromptBatch(texts, ids, torch.arange(len(texts)), columns)


def _is_message(message: Any) -> bool:
    """Whether this is a chat message. A collated one has lists of many rows' values."""
    return isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message


def _of_tokens(
    rows: list[Any], mask: Any, columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase
) -> PromptBatch:
    """Token prompts; the mask may have its padding on either side."""
    ids = [list(map(int, row)) for row in rows]
    keep = [[1] * len(row) for row in ids] if mask is None else [list(map(int, row)) for row in mask]
    if mask is None and all(isinstance(row, Tensor) for row in rows) and any(tokenizer.pad_token_id in r for r in ids):
        _refuse("a mapping with 'input_ids'", "there is padding, but no 'attention_mask'")
    if list(map(len, keep)) != list(map(len, ids)) or any(value not in (0, 1) for row in keep for value in row):
        _refuse("a mapping with 'input_ids', 'attention_mask'", "the mask is not one 0 or 1 per token")
    ids = [[token for token, kept in zip(*pair, strict=True) if kept] for pair in zip(ids, keep, strict=True)]
    for number, row in enumerate(ids):
        if not row or min(row) < 0 or max(row) >= len(tokenizer):
            _refuse(row, f"prompt {number} has " + ("an id outside the tokenizer's vocabulary" if row else "no token"))
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return PromptBatch(texts, ids, torch.arange(len(ids)), columns)
