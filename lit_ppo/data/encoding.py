"""Text to token ids: prompts for sampling, and padded rows of a batch."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from os import PathLike
from typing import Any, NoReturn

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_ppo.data.chat import Options, Span, render_chats
from lit_ppo.data.table import Message, lone_surrogate, short
from lit_ppo.shown import shown
from lit_ppo.special_tokens import without_repeats
from lit_ppo.validate import path, refuse

TEXTS_AT_ONCE = 1000
CHARACTERS_AT_ONCE = 2**22  # a tokenizer needs some 40 bytes for each while it works
SECONDS_BETWEEN_LOGS = 3.0


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[list[Message]],
    max_length: int | None = None,
    where: str = "encode_prompts",
    argument: str = "max_length",
    options: Options | None = None,
    place: Callable[[int], str] = "prompt {}".format,
) -> tuple[list[str], list[list[int]]]:
    """Render and tokenise prompts for generation.

    Plain text gets the beginning-of-text token of the tokenizer once, if it has one, and no end-of-text token. Chat
    messages give the ids of ``apply_chat_template(add_generation_prompt=True)``; a last message by the assistant is
    continued (``continue_final_message=True``).

    Args:
        tokenizer: Tokenizer of the model that generates.
        prompts: Strings, or lists of chat messages (``{"role": ..., "content": ...}``).
        max_length: Longer prompts lose tokens from the left, except a leading beginning-of-text token; one warning
            counts them. The texts are not cut. None: no limit.
        where: The caller, for messages.
        argument: The caller's name of ``max_length``, for messages.
        options: Variables of the chat template.
        place: Where a prompt comes from, by its number, for messages.

    Returns:
        The texts (chat messages rendered) and the ids.

    Raises:
        ValueError: The tokenizer has no chat template for chat messages, or it refuses some, or a prompt has no token.
    """
    chats = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if chats and len(chats) < len(prompts):
        raise ValueError(f"{where}: plain and chat prompts are mixed; use one kind")
    texts = [str(prompt) for prompt in prompts]
    if chats:
        texts = render_chats(tokenizer, chats, where, options=options, place=place)
    for i, text in enumerate(texts):
        if half := lone_surrogate(text):
            raise ValueError(f"{where}: {place(i)} holds {half}")
    # a template writes all special tokens itself
    ids = tokenize(tokenizer, texts, add_special_tokens=not chats)
    if not chats:
        ids = [_open_ended(tokenizer, text, row) for text, row in zip(texts, ids, strict=True)]
    for text, row in zip(texts, ids, strict=True):
        if not row:
            raise ValueError(f"{where}: the prompt {text!r:.60} has no token; remove it or use another tokenizer")
    return texts, truncate_left(ids, max_length, tokenizer.bos_token_id, f"{where}({argument}={max_length})", "prompts")


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool = True
) -> list[list[int]]:
    """Ids of many texts, without repeated special tokens; logs its progress every few seconds.

    The tokenizer's own warning about long texts is off: callers warn themselves.
    """
    ids: list[list[int]] = []
    options: dict[str, Any] = {"add_special_tokens": add_special_tokens, "verbose": False}
    logged = time.monotonic()
    for portion in _portions(texts):
        if len(portion[0]) > CHARACTERS_AT_ONCE:
            rank_zero_info(f"Tokenising a text of {len(portion[0])} characters")
        encoded = tokenizer(portion, **options)["input_ids"]
        if add_special_tokens:
            encoded = [row[kept] for row, kept in zip(encoded, without_repeats(tokenizer, encoded), strict=True)]
        ids += encoded
        if time.monotonic() - logged > SECONDS_BETWEEN_LOGS:
            rank_zero_info(f"Tokenised {len(ids)} of {len(texts)} texts")
            logged = time.monotonic()
    return ids


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for text in texts:
        if portion and (len(portion) == TEXTS_AT_ONCE or size + len(text) > CHARACTERS_AT_ONCE):
            yield portion
            portion, size = [], 0
        portion.append(text)
        size += len(text)
    if portion:
        yield portion


def _open_ended(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    """The ids without the end-of-text token that the tokenizer adds."""
    eos = tokenizer.eos_token_id
    if eos is not None and len(ids) > 1 and ids[-1] == eos and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    return ids


def tokens_in_spans(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    spans: Sequence[Sequence[Span]],
    *,
    add_special_tokens: bool,
    refuse: Callable[[int, str], NoReturn],
) -> tuple[list[list[int]], list[list[bool]]]:
    """Token ids of texts without an end-of-text token that the tokenizer adds, and whether each token is in a span.

    The text before a span has the tokens that it has alone, as a prompt for sampling has. Where a token would reach
    across the border of a span, both sides are tokenised apart.

    Args:
        tokenizer: Any.
        texts: Texts.
        spans: Parts of each text.
        add_special_tokens: False where the text has its own.
        refuse: Raises an error about a row, by its number.

    Raises:
        ValueError: Tokenised apart, the text would be another one.
    """
    borders = [
        [0, *sorted({border for span in row for border in span} - {0, len(text)}), len(text)]
        for text, row in zip(texts, spans, strict=True)
    ]
    starts = [text[:border] for text, row in zip(texts, borders, strict=True) for border in row[1:]]
    encoded = tokenize(tokenizer, starts, add_special_tokens)
    if add_special_tokens:
        encoded = [_open_ended(tokenizer, text, ids) for text, ids in zip(starts, encoded, strict=True)]
    prefixes = iter(encoded)
    all_ids, masks = [], []
    for row, (text, found) in enumerate(zip(texts, borders, strict=True)):
        pieces = [next(prefixes) for _ in found[1:]]
        if any(pieces[-1][: len(piece)] != piece for piece in pieces):
            parts = [text[a:b] for a, b in pairwise(found)]
            apart = list(accumulate([pieces[0], *tokenize(tokenizer, parts[1:], add_special_tokens=False)]))
            joint = tokenizer.decode(pieces[-1])
            if joint != tokenizer.decode(apart[-1]) and text.strip() in joint:  # else it keeps no white space anyway
                problem = f"a token reaches across the start of {short(parts[1])}; "
                refuse(row, problem + "begin it with the white space that is now at the end of the text before it")
            pieces = apart
        lengths = [b - a for a, b in pairwise([0, *map(len, pieces)])]
        inside = [any(first <= border < last for first, last in spans[row]) for border in found[:-1]]
        all_ids.append(pieces[-1])
        masks.append([value for value, length in zip(inside, lengths, strict=True) for _ in range(length)])
    return all_ids, masks


def truncate_left(
    ids: list[list[int]], max_length: int | None, bos: int | None, where: str, what: str
) -> list[list[int]]:
    """Cut rows from the left to ``max_length`` tokens, but keep a leading ``bos``; one warning counts them."""
    if max_length is None:
        return ids
    n_cut, longest = sum(len(row) > max_length for row in ids), max(map(len, ids), default=0)
    if n_cut:
        rank_zero_warn(
            f"{where}: {n_cut} of {len(ids)} {what} are longer and were cut from the left; the longest has {longest} "
            "tokens"
        )
    return [row if len(row) <= max_length else _tail(row, max_length, bos) for row in ids]


def _tail(row: list[int], length: int, bos: int | None) -> list[int]:
    head = row[:1] if bos is not None and row[0] == bos else []
    return head + row[len(row) - (length - len(head)) :]


def checked_tokenizer(owner: object, value: Any) -> Any:
    """The argument ``tokenizer`` of a data module: a tokenizer, its path or hub name, or None.

    Raises:
        ValueError: It is something else.
    """
    if value is None or (callable(value) and hasattr(value, "eos_token_id")):
        return value
    if not isinstance(value, str | PathLike):
        refuse(owner, "tokenizer", value, "must be a tokenizer of transformers, its folder or its hub name")
    return path(owner, "tokenizer", value)


def resolve_tokenizer(where: str, tokenizer: str | PreTrainedTokenizerBase | None, trainer: Any) -> Any:
    """A tokenizer: the given one, loaded if it is a path or name, or that of the module being trained.

    Raises:
        ValueError: There is none, or it cannot be loaded.
    """
    if isinstance(tokenizer, str):
        try:
            return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{where}(tokenizer={tokenizer!r}): it cannot be loaded ({shown(error)}); "
                "give the folder of a saved tokenizer, or a hub name"
            ) from error
    if tokenizer is None:
        tokenizer = getattr(getattr(trainer, "lightning_module", None), "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"{where}(tokenizer=None): there is no module being trained that has a tokenizer; "
            "give a tokenizer, a path or a hub name"
        )
    return tokenizer


def padding_id(where: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token of a tokenizer, or its end-of-text token if it has none.

    Raises:
        ValueError: It has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise ValueError(
        f"{where}: the tokenizer {tokenizer.name_or_path!r} has neither a padding nor an end-of-text token; "
        "set tokenizer.pad_token"
    )


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Rows as ``input_ids`` and ``attention_mask``, padded on the right to the longest row.

    >>> {name: x.tolist() for name, x in pad_right([[5, 6], [7]], pad_id=0).items()}
    {'input_ids': [[5, 6], [7, 0]], 'attention_mask': [[1, 1], [1, 0]]}
    """
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
