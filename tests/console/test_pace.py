"""The estimate of the time left on a machine that does other things, too."""

import random
from itertools import pairwise

from lit_ppo.console.pace import Pace


def estimates(durations: list[float]) -> list[float]:
    """Minutes left after each update from the second on."""
    pace, found = Pace(), []
    for done, seconds in enumerate(durations, 1):
        pace.add(seconds)
        if pace.seconds is not None:
            found.append((len(durations) - done) * pace.seconds / 60)
    return found


def test_stalls_do_not_make_the_time_left_jump():
    """600 steps near 0.15 s, of which every 30th waits for 10 s more; the first takes 12 s.

    The mean over the last twenty of them jumps between 1 and 6 minutes.
    """
    rng = random.Random(0)
    durations = [12.0] + [rng.uniform(0.1, 0.2) + 10.0 * (i % 30 == 17) for i in range(599)]
    found = estimates(durations)
    means = [sum(durations[max(0, n - 20) : n]) / min(n, 20) * (600 - n) / 60 for n in range(2, 600)]
    assert max(b / a for a, b in pairwise(means)) > 4
    assert max(b / a for a, b in pairwise(found[:-20])) < 1.3
    assert max(found) < 1.3 * sum(durations) / 60


def test_regular_slow_updates_count_in_full_after_a_while():
    """Every fifth takes 20 times as long: 4.8 s each on average."""
    pace = Pace()
    for i in range(400):
        pace.add(20.0 if i % 5 == 0 else 1.0)
    assert pace.seconds == 4.8


def test_another_speed_is_reached_gradually():
    """From 1 s to 4 s an update, at update 100."""
    found = estimates([1.0] * 100 + [4.0] * 900)
    assert max(b / a for a, b in pairwise(found[:-2])) < 1.1
    assert abs(found[300] / (699 * 4 / 60) - 1) < 0.01
