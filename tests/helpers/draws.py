"""Rows drawn by weight, by the documented rule: systematic resampling of shuffled rows."""

from collections.abc import Sequence

import numpy as np


def draws(seed: int, update: int, weights: Sequence[float], size: int) -> list[int]:
    """The rows of an update: points at equal distances on a line on which each row is as long as its weight."""
    random = np.random.default_rng([seed, update, 1])
    rows = random.permutation([row for row, weight in enumerate(weights) if weight > 0])
    start, total, drawn = random.random(), sum(weights), []
    for point in range(size):
        left = (start + point) / size * total
        for row in rows:
            left -= weights[row]
            if left < 0:
                drawn.append(row)
                break
    return [int(row) for row in random.permutation(drawn)]
