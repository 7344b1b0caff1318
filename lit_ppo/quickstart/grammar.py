"""A grammar of short reviews, its generator and its parser.

A review is a neutral opening (what was seen, read or eaten, by whom, when) and one of the `PATTERNS`, which expresses
an opinion. Templates name slots in braces; ``{^slot}`` begins with a capital. The generator fills the slots, and the
parser turns the same templates into regular expressions.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from lit_ppo.quickstart.words import OPINIONS, PLAIN, POLARITIES, SUBJECTS

OPENINGS = (
    "{^when} {who} {took} {item}",
    "{^when} {who} {took} {item} {place}",
    "{^who} {took} {item} {place}",
    "{^who} {took} {item} because {reason}",
    "After {event} {who} {took} {item}",
)

PATTERNS: Mapping[str, str] = {
    "statement": ". The {noun} was {degree} {quality}.",
    "both": ", and both the {noun} and the {noun} were {quality}.",
    "list": ". We found the {noun} {quality}, the {noun} {quality} and the {noun} {quality}.",
    "contrast": ". Although the {noun} seemed {modest}, the {noun} turned out {quality}.",
    "taste": ", and {we} {judged} every {part} of it.",
    "advice": ". {^we} would {readily} recommend it to {audience}.",
    "mood": ". It left {whom} {feeling} {span}.",
    "hearsay": ", and {speaker} called the {noun} {quality}.",
    "question": ". Was the {noun} worth {cost}? {^answer}.",
    "comparison": ". Next to {rival}, the {noun} seemed {better}.",
    "stars": ". {^speaker} gave the {noun} {count} of five stars.",
    "summary": "; for {audience} the {noun} was {verdict}.",
    "memory": ". What {we} remembered most was the {quality} {noun}.",
    "effect": ", which {moved} {whom} {span}.",
}

SHARES: Mapping[str, float] = {"positive": 0.3, "negative": 0.35, "neutral": 0.35}
DISSENT = 0.2  # fraction of lists with an opinion in which one of the three words contradicts the other two

_SLOT = re.compile(r"\{(\^?)(\w+)\}")


@dataclass(frozen=True)
class Parsed:
    """A parsed review.

    Args:
        subject: What is reviewed: film, book, meal, ...
        pattern: Name of the sentence pattern.
        polarity: "positive" with more positive than negative words, "negative" with fewer, otherwise "neutral".
        opening: The neutral opening, without the punctuation after it.
    """

    subject: str
    pattern: str
    polarity: str
    opening: str


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _choose(rng: random.Random, options: tuple[str, ...]) -> str:
    """One option; only ``random()`` is guaranteed to give the same numbers in every Python version."""
    return options[int(rng.random() * len(options))]


def _fill(rng: random.Random, template: str, subject: str, polarities: list[str]) -> str:
    """Fill the slots of a template, the opinions with these polarities in order; no word is used twice."""
    used: set[str] = set()
    opinions = iter(polarities)

    def word(match: re.Match[str]) -> str:
        capital, slot = match.groups()
        options = OPINIONS[slot][next(opinions)] if slot in OPINIONS else _plain(subject, slot)
        chosen = _choose(rng, tuple(option for option in options if option not in used))
        used.add(chosen)
        return _capital(chosen) if capital else chosen

    return _SLOT.sub(word, template)


def _plain(subject: str, slot: str) -> tuple[str, ...]:
    return PLAIN[slot] if slot in PLAIN else SUBJECTS[subject][slot]


def _polarities(rng: random.Random, pattern: str, polarity: str) -> list[str]:
    """The polarity of each opinion in a sentence with this polarity."""
    words = [polarity] * (3 if pattern == "list" else 1)
    if pattern == "list" and polarity != "neutral" and rng.random() < DISSENT:
        words[int(rng.random() * 3)] = "negative" if polarity == "positive" else "positive"
    return words


def generate_opening(rng: random.Random, subject: str | None = None) -> str:
    """A neutral opening such as ``Last Friday we watched a western at the cinema``."""
    subject = subject or _choose(rng, tuple(SUBJECTS))
    return _fill(rng, _choose(rng, OPENINGS), subject, [])


def generate(rng: random.Random, polarity: str | None = None, pattern: str | None = None) -> str:
    """One review.

    Args:
        rng: Random generator; the same state gives the same review.
        polarity: "positive", "negative" or "neutral"; None draws it with the probabilities `SHARES`.
        pattern: A key of `PATTERNS`; None draws one uniformly.

    >>> generate(random.Random(1), "positive", "both")
    'After the parade we saw a documentary, and both the editing and the camera work were wonderful.'
    """
    subject = _choose(rng, tuple(SUBJECTS))
    opening = generate_opening(rng, subject)
    pattern = pattern or _choose(rng, tuple(PATTERNS))
    polarity = polarity or rng.choices(POLARITIES, [SHARES[name] for name in POLARITIES])[0]
    return opening + _fill(rng, PATTERNS[pattern], subject, _polarities(rng, pattern, polarity))


def _expression(template: str, subject: str) -> str:
    """The template as a regular expression with a group per opinion."""
    pieces, end = [], 0
    for match in _SLOT.finditer(template):
        capital, slot = match.groups()
        options = sum(OPINIONS[slot].values(), ()) if slot in OPINIONS else _plain(subject, slot)
        entries = "|".join(re.escape(_capital(option) if capital else option) for option in options)
        pieces += [re.escape(template[end : match.start()]), f"({entries})" if slot in OPINIONS else f"(?:{entries})"]
        end = match.end()
    return "".join([*pieces, re.escape(template[end:])])


@cache
def _opening_expression(subject: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{_expression(template, subject)})" for template in OPENINGS))


@cache
def _pattern_expression(subject: str, pattern: str) -> re.Pattern[str]:
    return re.compile(_expression(PATTERNS[pattern], subject))


_POLARITY = {word: polarity for slot in OPINIONS.values() for polarity, words in slot.items() for word in words}


def parse(sentence: str) -> Parsed | None:
    """Parse a review; None for a text that the grammar cannot generate.

    Args:
        sentence: Any text; white space around it is ignored.

    >>> parse("We ate a pizza.") is None
    True
    """
    text = sentence.strip()
    opening = re.split(r"[.,;]", text, maxsplit=1)[0]  # openings have no punctuation
    subject = next((name for name in SUBJECTS if _opening_expression(name).fullmatch(opening)), None)
    if subject is None:
        return None
    for pattern in PATTERNS:
        found = _pattern_expression(subject, pattern).fullmatch(text, len(opening))
        if found:
            votes = [_POLARITY[word[:1].lower() + word[1:]] for word in found.groups()]
            balance = votes.count("positive") - votes.count("negative")
            polarity = "positive" if balance > 0 else "negative" if balance < 0 else "neutral"
            return Parsed(subject, pattern, polarity, opening)
    return None
