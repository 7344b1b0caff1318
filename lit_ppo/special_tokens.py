"""Special tokens that a text has already and its tokenizer adds again."""

from collections.abc import Sequence
from typing import Any

PROBES = ("a", "1", ".", "\u3042")  # some tokenizers drop what is not of their script


def without_repeats(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[slice]:
    """The parts of tokenized texts that leave out a second beginning-of-text or end-of-text token.

    Text that a chat template has rendered has its own special tokens, and many tokenizers add theirs again. Where the
    tokenizer adds none, a repeated token belongs to the text and stays.

    Args:
        tokenizer: The tokenizer that gave the ids, with its special tokens.
        rows: Token ids of each text.
    """
    bare: list[int] = []
    for text in PROBES:
        bare, full = (tokenizer(text, add_special_tokens=added)["input_ids"] for added in (False, True))
        if bare:
            break
    else:  # of a tokenizer for other scripts: nothing says which tokens it adds
        return [slice(0, len(ids)) for ids in rows]
    adds_first, adds_last = full[1:] == bare or full[1:-1] == bare, full[:-1] == bare or full[1:-1] == bare
    kept = []
    for ids in rows:
        start = int(adds_first and len(ids) > 1 and ids[0] == ids[1] == full[0])
        repeated_end = adds_last and len(ids) - start > 1 and ids[-1] == ids[-2] == full[-1]
        kept.append(slice(start, len(ids) - int(repeated_end)))
    return kept
