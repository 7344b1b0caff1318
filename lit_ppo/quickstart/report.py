"""Statistics of generated reviews, by the parser of the grammar."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lit_ppo.quickstart.grammar import parse


@dataclass(frozen=True)
class Report:
    """Statistics of a set of reviews.

    Args:
        number: Number of reviews.
        parsed: Fraction that the grammar can generate.
        positive: Fraction of all that is positive; reviews that do not parse are not.
        distinct_bigrams: Number of distinct pairs of adjacent words or punctuation marks in the responses.
        largest_pattern: Fraction of all with the most frequent sentence pattern.
        patterns: Count of each pattern.
    """

    number: int
    parsed: float
    positive: float
    distinct_bigrams: int
    largest_pattern: float
    patterns: dict[str, int]

    def __str__(self) -> str:
        return (
            f"{self.number} reviews: {self.positive:.1%} positive, {self.parsed:.1%} in the grammar, "
            f"{self.distinct_bigrams} distinct bigrams, largest pattern {self.largest_pattern:.1%}"
        )


def report(prompts: Sequence[str], responses: Sequence[str]) -> Report:
    """Parse each prompt with its response, and count.

    Args:
        prompts: Neutral openings.
        responses: One response to each.

    Raises:
        ValueError: There are none, or their numbers differ.

    >>> str(report(["We read a novel in bed"] * 2, [". The plot was.", ", and I loved every page of it."]))
    '2 reviews: 50.0% positive, 50.0% in the grammar, 12 distinct bigrams, largest pattern 50.0%'
    """
    if not prompts or len(prompts) != len(responses):
        raise ValueError(
            f"report(prompts, responses): {len(prompts)} and {len(responses)}; give one response per prompt"
        )
    number = len(prompts)
    found = [parse(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]
    patterns = Counter(review.pattern for review in found if review is not None)
    bigrams = set()
    for response in responses:
        pieces = re.findall(r"\w+|[^\w\s]", response.lower())
        bigrams |= set(pairwise(pieces))
    return Report(
        number=number,
        parsed=sum(review is not None for review in found) / number,
        positive=sum(review is not None and review.polarity == "positive" for review in found) / number,
        distinct_bigrams=len(bigrams),
        largest_pattern=max(patterns.values(), default=0) / number,
        patterns=dict(patterns),
    )
