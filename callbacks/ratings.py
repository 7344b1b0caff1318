"""Human ratings of responses, from a file that grows during the run."""

import math
from pathlib import Path
from typing import Any

from lit_ppo.data.files import SUFFIXES, read_table

Ratings = dict[int, list[float]]  # by number of updates done


def is_ratings(name: Any) -> bool:
    """Whether an argument is the name of a ratings file.

    >>> [is_ratings(name) for name in ("runs/ratings.jsonl", "my.gold", "judge", len)]
    [True, False, False, False]
    """
    return isinstance(name, str) and Path(name).suffix.lower() in SUFFIXES


def read_ratings(where: str, path: str) -> Ratings:
    """The ratings so far, by update; rows without a rating are left out, and a missing or empty file has none.

    Args:
        where: Argument to name in messages.
        path: JSON lines, CSV or TSV with the columns ``update`` and ``rating``, and any others.

    Raises:
        ValueError: The file cannot be read; names file and line.
    """
    if not Path(path).expanduser().exists():
        return {}
    table = read_table(where, path, may_be_empty=True)
    ratings: Ratings = {}
    for i, row in enumerate(table.rows):
        if row.get("rating") not in (None, ""):
            update, rating = (_number(row.get(name)) for name in ("update", "rating"))
            if update is None or update < 0 or update != int(update):
                problem = f"update is {row.get('update')!r:.80}; give the number of updates done when the response was "
                table.refuse(i, problem + "sampled, as in samples.jsonl")
            if rating is None:
                table.refuse(i, f"rating is {row['rating']!r:.80}; give a finite number")
            ratings.setdefault(int(update), []).append(rating)
    return ratings


def _number(value: Any) -> float | None:
    """A finite number, also from text; None for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
