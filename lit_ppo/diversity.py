"""How alike responses are: pure functions of their tokens.

Shapes: ids and mask (B, T); the mask is boolean, True where a response token is, from the first column on.
"""

import torch
from torch import Tensor


def distinct_ngrams(ids: Tensor, mask: Tensor, n: int) -> float:
    r"""Different sequences of n neighbouring tokens in all responses, over the number of all such sequences.

    .. math:: \mathrm{distinct}_n = |\{g_1, ..., g_N\}| \,/\, N

    Args:
        ids: Tokens.
        mask: Where they count.
        n: Length of a sequence, at least 1.

    Returns:
        1 where none comes twice, and where no response has n tokens.

    Source: Li et al. 2016, arXiv:1510.03055, section 5 (distinct-1, distinct-2).

    >>> ids = torch.tensor([[4, 5, 4, 5], [4, 5, 9, 0]])  # 4 5, 5 4, 4 5; 4 5, 5 9
    >>> distinct_ngrams(ids, torch.tensor([[True] * 4, [True, True, True, False]]), n=2)
    0.6
    """
    if ids.shape[1] < n:
        return 1.0
    tokens, grams = ids.unfold(1, n, 1)[mask.unfold(1, n, 1).all(-1)].unique(return_inverse=True)
    if not len(grams):
        return 1.0
    kinds = grams[:, 0]  # numbered anew with each token: unique(dim=0), which compares rows, takes forty times as long
    for token in grams[:, 1:].unbind(1):
        kinds = (kinds * len(tokens) + token).unique(return_inverse=True)[1]
    return (int(kinds.max()) + 1) / len(kinds)


def duplicate_fraction(ids: Tensor, mask: Tensor) -> float:
    """Share of the responses that repeat, token for token, another one that was counted before.

    Args:
        ids: Tokens.
        mask: Where they count.

    Returns:
        0 where all differ, (B - 1) / B where all are the same.

    >>> duplicate_fraction(torch.tensor([[4, 5], [4, 6], [4, 5], [4, 5]]), torch.ones(4, 2, dtype=torch.bool))
    0.5
    """
    return 1.0 - len(_marked(ids, mask).unique(dim=0)) / len(ids)


def largest_opening(ids: Tensor, mask: Tensor, n: int) -> float:
    """Share of the responses that begin with the most frequent first n tokens.

    Args:
        ids: Tokens.
        mask: Where they count; a shorter response is its own opening.
        n: Length of an opening.

    >>> largest_opening(torch.tensor([[4, 5, 1], [4, 5, 2], [4, 6, 2], [7, 5, 2]]), torch.ones(4, 3).bool(), n=2)
    0.5
    """
    counts = _marked(ids[:, :n], mask[:, :n]).unique(dim=0, return_counts=True)[1]
    return float(counts.max()) / len(ids)


def _marked(ids: Tensor, mask: Tensor) -> Tensor:
    """The tokens, -1 where none counts."""
    return torch.where(mask.bool(), ids, -1)
