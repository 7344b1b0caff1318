"""Ratings that people give to the responses of a run, from a file that grows while the run goes on."""

import math
from pathlib import Path
from typing import Any

from lit_ppo.data.files import READ_HERE, read_table

Ratings = dict[int, list[float]]  # by the number of updates done


def is_ratings(name: Any) -> bool:
    """Whether something names a file of ratings.

    >>> [is_ratings(name) for name in ("runs/ratings.jsonl", "my.gold", "judge", len)]
    [True, False, False, False]
    """
    return isinstance(name, str) and Path(name).suffix.lower() in READ_HERE


def read_ratings(where: str, path: str) -> Ratings:
    """The ratings given so far, by update; rows without one, and a file that is not there yet, are left out.

    Args:
        where: Argument to name in messages.
        path: JSON lines, CSV or TSV with ``update`` and ``rating``; other columns do not matter.

    Raises:
        ValueError: Something in the file cannot be read; names file and line.
    """
    file = Path(path).expanduser()
    if not file.is_file() or not file.read_bytes().strip():
        return {}
    table = read_table(where, path)
    ratings: Ratings = {}
    for i, row in enumerate(table.rows):
        if row.get("rating") not in (None, ""):
            update, rating = (_number(row.get(name)) for name in ("update", "rating"))
            if update is None or update < 0 or update != int(update):
                raise ValueError(
                    f"{where}: {table.place(i)}: update is {row.get('update')!r}; give the number of updates done when "
                    "the response was sampled, as samples.jsonl has it"
                )
            if rating is None:
                raise ValueError(f"{where}: {table.place(i)}: rating is {row['rating']!r}; give a finite number")
            ratings.setdefault(int(update), []).append(rating)
    return ratings


def _number(value: Any) -> float | None:
    """A finite number, also one that is written as text; None for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
