"""What a reward model reads: prompt and response as text, then as token ids."""

import warnings
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from lit_ppo.data.chat import Options, Span, check_template, continued, each_chat, render
from lit_ppo.special_tokens import without_repeats


class Row(NamedTuple):
    """One text as token ids."""

    ids: list[int]
    response: list[bool]  # True at the tokens of the response; empty where nobody asked


def conversations(
    tokenizer: Any, where: str, experience: Any, ended: Sequence[bool], options: Options
) -> tuple[list[str], list[Span]]:
    """Prompt and response as one text each: joined, or rendered by the chat template.

    The template closes the turn of a response that ended. One that was cut off stays open, as it was sampled.

    Args:
        tokenizer: The reward model's.
        where: For messages.
        experience: Its ``columns`` hold ``messages`` where prompts are chats.
        ended: Whether a stop token ended each response.
        options: Variables of the chat template.
    """
    messages = experience.columns.get("messages")
    if messages is None:
        pairs = list(zip(experience.prompts, experience.responses, strict=True))
        return [prompt + text for prompt, text in pairs], [(len(p), len(p) + len(text)) for p, text in pairs]
    check_template(tokenizer, where, options)

    def place(row: int) -> str:
        return f"{where}: chat {row}"

    def one(row: int) -> tuple[str, Span]:
        return _render(tokenizer, place(row), messages[row], experience.responses[row], options)

    rendered = each_chat(one, messages, place)
    texts = [text if end else text[: span[1]] for (text, span), end in zip(rendered, ended, strict=True)]
    return texts, [span for _, span in rendered]


def _render(
    tokenizer: Any, where: str, messages: list[dict[str, Any]], response: str, options: Options
) -> tuple[str, Span]:
    """The chat with the response as its last turn, or as the end of it where the assistant has begun it."""
    chat = continued(messages, [{"role": "assistant", "content": response}])
    text = render(tokenizer, chat, where, options, "closed")
    words = response.strip()  # templates may strip a turn
    other = next(digit for digit in "012" if digit not in (words[:1], words[-1:]))
    chat_of_other = continued(messages, [{"role": "assistant", "content": other}])
    first, last = _difference(text, render(tokenizer, chat_of_other, where, options, "closed"))
    found = text[first:last]
    if found.strip() == words:
        first += len(found) - len(found.lstrip()) if words else 0
        return text, (first, first + len(words))
    prompt = render(tokenizer, messages, where, options, "ask" if len(chat) > len(messages) else "open")
    # the template changed the response: everything after the prompt counts as the response
    differ = (i for i, (ours, theirs) in enumerate(zip(prompt, text, strict=False)) if ours != theirs)
    return text, (next(differ, min(len(prompt), len(text))), len(text))


def _difference(text: str, other: str) -> Span:
    """Where a text differs from another one, between what both begin and end with."""
    first = _n_equal(text, other)
    return first, len(text) - _n_equal(text[first:][::-1], other[first:][::-1])


def _n_equal(text: str, other: str) -> int:
    """How many characters are equal from the start on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))


def questions_and_answers(experience: Any) -> list[tuple[str, str]]:
    """The two segments of a model for question-answer pairs; of a chat, the texts of all its turns are the question."""
    messages = experience.columns.get("messages")
    chats = None if messages is None else ["\n\n".join(turn["content"] for turn in chat) for chat in messages]
    return [(q.strip(), a.strip()) for q, a in zip(chats or experience.prompts, experience.responses, strict=True)]


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    pairs: Sequence[str] | None = None,
    spans: Sequence[Span] | None = None,
    append_eos: Sequence[bool] | None = None,
    add_special_tokens: bool = True,
    limit: float,
) -> tuple[list[Row], int]:
    """Token ids of texts, or of pairs of texts; what does not fit loses its beginning.

    Args:
        tokenizer: The reward model's; it truncates on the left.
        texts: Texts, or the first segments of pairs.
        pairs: Second segments.
        spans: Responses within the texts, where the tokens of responses are asked for.
        append_eos: For each text, whether an end-of-sequence token is appended unless it ends with one.
        add_special_tokens: False where the text has its own, as a rendered chat template does.
        limit: Maximum number of tokens.

    Returns:
        The rows, and how many texts were too long.
    """
    appended = append_eos or [False] * len(texts)
    options = {"add_special_tokens": add_special_tokens, "return_offsets_mapping": spans is not None, "verbose": False}
    segments = [list(texts), *([] if pairs is None else [list(pairs)])]
    encoded = tokenizer(*segments, **options)
    too_long = sum(len(ids) + end > limit for ids, end in zip(encoded["input_ids"], appended, strict=True))
    if too_long:
        encoded = tokenizer(*segments, truncation=True, max_length=int(limit) - any(appended), **options)
    alone = add_special_tokens and pairs is None
    kept = without_repeats(tokenizer, encoded["input_ids"]) if alone else [slice(None)] * len(texts)
    rows = []
    for i, (ids, end) in enumerate(zip(encoded["input_ids"], appended, strict=True)):
        ids, response = ids[kept[i]], []
        if spans is not None:
            first, last = spans[i]
            response = [start < last and stop > first for start, stop in encoded["offset_mapping"][i][kept[i]]]
        if end and ids[-1:] != [tokenizer.eos_token_id]:
            ids, response = [*ids, tokenizer.eos_token_id], [*response, *([True] if response else [])]
        rows.append(Row(ids, response))
    return rows, too_long


def warn_too_long(where: str, too_long: int, count: int, limit: float) -> None:
    """Say that texts lost their beginning."""
    warnings.warn(
        f"{where}: {too_long} of {count} texts exceed its {limit:g} positions and lose their beginning (warned once); "
        "shorten prompts or responses",
        stacklevel=5,
    )
