"""What a set of written reviews is like, by the grammar's own parser."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lit_ppo.quickstart.grammar import parse


@dataclass(frozen=True)
class Report:
    """Figures of a set of reviews.

    Args:
        number: Reviews.
        parsed: Share that the grammar can have written.
        positive: Share of all that is positive; what does not parse is not.
        distinct_bigrams: Different pairs of neighbouring words and punctuation marks in the responses.
        largest_pattern: Share of all that is of the most frequent sentence pattern.
        patterns: How often each pattern occurs.
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
        responses: What was written behind each.

    Raises:
        ValueError: There are none, or not equally many.

    >>> str(report(["We read a novel in bed"] * 2, [". The plot was.", ", and I loved every page of it."]))
    '2 reviews: 50.0% positive, 50.0% in the grammar, 12 distinct bigrams, largest pattern 50.0%'
    """
    if not prompts or len(prompts) != len(responses):
        raise ValueError(f"report(prompts, responses): {len(prompts)} and {len(responses)}; give a response to each")
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
