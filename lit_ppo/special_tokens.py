"""Special tokens that a text has already and its tokenizer adds again."""

from collections.abc import Sequence
from typing import Any


def without_repeats(tokenizer: Any, ids: Sequence[int]) -> slice:
    """The part of a text's tokens that leaves out a second beginning-of-text and a second end-of-text token.

    Text that a chat template has rendered has its own special tokens, and many tokenizers add theirs again. Where the
    tokenizer adds none, a repeated token belongs to the text and stays.

    Args:
        tokenizer: The tokenizer that gave the ids.
        ids: Token ids of one text.

    >>> from types import SimpleNamespace
    >>> class AddsBos(SimpleNamespace):
    ...     def __call__(self, text):
    ...         return {"input_ids": [1, *map(int, text.split())]}
    >>> tokenizer = AddsBos(bos_token_id=1, cls_token_id=None, eos_token_id=2, sep_token_id=None)
    >>> ids = tokenizer("1 7 2 2")["input_ids"]
    >>> ids[without_repeats(tokenizer, ids)]
    [1, 7, 2, 2]
    """
    first = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    last = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    start = int(len(ids) > 1 and ids[0] == ids[1] and ids[0] in first and _adds(tokenizer, ids[0]))
    end = len(ids) - start > 1 and ids[-1] == ids[-2] and ids[-1] in last and _adds(tokenizer, ids[-1])
    return slice(start, len(ids) - int(end))


def _adds(tokenizer: Any, token: int) -> bool:
    """Whether the tokenizer adds this token to every text."""
    return token in tokenizer("")["input_ids"]
