"""How long an update takes, for the estimate of the time left."""

from collections import deque
from statistics import median

FEWEST, MOST = 20, 500  # updates that are averaged


class Pace:
    """The mean duration of the latest half of the updates, in which no single one counts much.

    A short window follows every change in what else the machine does, so it grows with the run. The first update also
    warms up caches and compilers, and does not count. A duration is cut at the value with which it raises the mean by
    about a quarter: one that waited for the disk or another program would change the time left by minutes.
    """

    def __init__(self) -> None:
        self._count = 0
        self._durations: deque[float] = deque(maxlen=MOST)

    def add(self, seconds: float) -> None:
        """Count an update."""
        if self._count:
            self._durations.append(seconds)
        self._count += 1

    @property
    def seconds(self) -> float | None:
        """Of one update; None before the end of the second.

        >>> pace = Pace()
        >>> for seconds in (60.0, 2.0, 2.0, 2.0, 30.0):
        ...     pace.add(seconds)
        >>> pace.seconds  # the 30 s count as 2 s x (1 + 4 / 4)
        2.5
        """
        recent = [*self._durations][-max(FEWEST, self._count // 2) :]
        if not recent:
            return None
        longest = median(recent) * (1 + len(recent) / 4)
        return sum(min(seconds, longest) for seconds in recent) / len(recent)
