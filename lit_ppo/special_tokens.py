"""Special tokens that a text has already and its tokenizer adds again."""

from collections.abc import Sequence
from typing import Any


def without_repeats(tokenizer: Any, ids: Sequence[int]) -> slice:
    """The part of a text's tokens that leaves out a second beginning-of-text and a second end-of-text token.

    Text that a chat template has rendered has its own special tokens, and many tokenizers add theirs again.

    Args:
        tokenizer: The tokenizer that gave the ids.
        ids: Token ids of one text.

    >>> from types import SimpleNamespace
    >>> tokenizer = SimpleNamespace(bos_token_id=1, cls_token_id=None, eos_token_id=2, sep_token_id=None)
    >>> [1, 1, 7, 2][without_repeats(tokenizer, [1, 1, 7, 2])]
    [1, 7, 2]
    """
    first = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    last = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    start = int(len(ids) > 1 and ids[0] == ids[1] and ids[0] in first)
    repeated_end = len(ids) - start > 1 and ids[-1] == ids[-2] and ids[-1] in last
    return slice(start, len(ids) - int(repeated_end))
