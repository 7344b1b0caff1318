"""The quickstart's data: text for the cold start, labelled text, and prompts, all written by the grammar."""

import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_ppo.data.text import TextDataModule
from lit_ppo.quickstart import words
from lit_ppo.quickstart.grammar import OPENINGS, PATTERNS, SHARES, generate, generate_opening, parse
from lit_ppo.validate import integer

RATINGS = {"positive": 0.95, "neutral": 0.3, "negative": 0.05}
"""Label by polarity: the share of raters who would call the review positive. Never 0 or 1, so that a reward model
trained on it has a score of moderate size to reach, and does not grow it for ever."""

MARKER = "written.json"


class ReviewText(TextDataModule):
    """Reviews for a cold start; before it reads them, it writes them and the files of the later stages.

    The files are the same wherever they are written: they depend on ``text_seed`` and the numbers of rows alone.
    Openings that are evaluation prompts appear in no other file.

    Args:
        path: Reviews for the cold start, column ``text``.
        labelled_path: Reviews for a reward model, columns ``text`` and ``label`` (0 bad to 1 good).
        prompts_path: Neutral openings to train PPO on, column ``prompt``.
        eval_prompts_path: Neutral openings that nothing else has.
        n_reviews: Rows of ``path``.
        n_labelled: Rows of ``labelled_path``.
        n_prompts: Rows of ``prompts_path``.
        n_eval_prompts: Rows of ``eval_prompts_path``.
        text_seed: Seed of the text; other runs of the same text differ by their own seed.
        **kwargs: As in :class:`lit_ppo.TextDataModule`.
    """

    def __init__(
        self,
        path: str = "reviews.jsonl",
        *,
        labelled_path: str = "labelled.jsonl",
        prompts_path: str = "prompts.jsonl",
        eval_prompts_path: str = "prompts_eval.jsonl",
        n_reviews: int = 52_000,
        n_labelled: int = 12_000,
        n_prompts: int = 5_120,
        n_eval_prompts: int = 256,
        text_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, **kwargs)
        self.labelled_path, self.prompts_path, self.eval_prompts_path = labelled_path, prompts_path, eval_prompts_path
        self.n_reviews = integer(self, "n_reviews", n_reviews)
        self.n_labelled = integer(self, "n_labelled", n_labelled)
        self.n_prompts = integer(self, "n_prompts", n_prompts)
        self.n_eval_prompts = integer(self, "n_eval_prompts", n_eval_prompts)
        self.text_seed = text_seed

    def prepare_data(self) -> None:
        """Write the files unless they are there, then train the tokenizer."""
        root = Path(self.data_root or ".")
        files: dict[str, Callable[[random.Random], Iterator[dict[str, Any]]]] = {
            self.path: lambda rng: reviews(rng, self.n_reviews),
            self.labelled_path: lambda rng: labelled(rng, self.n_labelled),
            self.prompts_path: lambda rng: prompts(rng, self.n_prompts, held_out=False),
            self.eval_prompts_path: lambda rng: prompts(rng, self.n_eval_prompts, held_out=True),
        }
        sizes = [self.n_reviews, self.n_labelled, self.n_prompts, self.n_eval_prompts]
        wanted = {"grammar": fingerprint(), "seed": self.text_seed, "rows": dict(zip(files, sizes, strict=True))}
        if not _complete(root, wanted):
            rank_zero_info(f"Writing reviews, labels and prompts: {root}")
            root.mkdir(parents=True, exist_ok=True)
            (root / MARKER).unlink(missing_ok=True)
            for stream, (name, rows) in enumerate(files.items()):
                _write(root / name, rows(random.Random(1000 * self.text_seed + stream)))
            (root / MARKER).write_text(json.dumps(wanted), encoding="utf-8")
        super().prepare_data()


def _complete(root: Path, wanted: dict[str, Any]) -> bool:
    marker = root / MARKER
    if not marker.is_file() or not all((root / name).is_file() for name in wanted["rows"]):
        return False
    return bool(json.loads(marker.read_text(encoding="utf-8")) == wanted)


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    partial.replace(path)


def fingerprint() -> str:
    """Of the grammar: text written by another version of it is not complete."""
    parts = (words.SUBJECTS, words.PLAIN, words.OPINIONS, OPENINGS, PATTERNS, SHARES, RATINGS)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def is_held_out(opening: str) -> bool:
    """Whether an opening is kept for evaluation: one in eight, by its checksum."""
    return zlib.crc32(opening.encode()) % 8 == 0


def _trained_on(rng: random.Random, **kwargs: Any) -> tuple[str, str]:
    """A review whose opening is not held out, and its polarity."""
    while True:
        review = generate(rng, **kwargs)
        found = parse(review)
        assert found is not None
        if not is_held_out(found.opening):
            return review, found.polarity


def reviews(rng: random.Random, number: int) -> Iterator[dict[str, Any]]:
    """Rows for the cold start."""
    for _ in range(number):
        yield {"text": _trained_on(rng)[0]}


def labelled(rng: random.Random, number: int) -> Iterator[dict[str, Any]]:
    """Rows for a reward model, the same number of each pattern and polarity."""
    kinds = [(pattern, polarity) for pattern in PATTERNS for polarity in words.POLARITIES]
    for i in range(number):
        pattern, polarity = kinds[i % len(kinds)]
        text, found = _trained_on(rng, pattern=pattern, polarity=polarity)
        yield {"text": text, "label": RATINGS[found]}


def prompts(rng: random.Random, number: int, *, held_out: bool) -> Iterator[dict[str, Any]]:
    """Different neutral openings, all held out or none."""
    seen: set[str] = set()
    while len(seen) < number:
        opening = generate_opening(rng)
        if opening not in seen and is_held_out(opening) == held_out:
            seen.add(opening)
            yield {"prompt": opening}
