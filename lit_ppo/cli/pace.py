"""How long updates take, and what that makes of those to come."""

import time
from collections import deque
from collections.abc import Callable

RECENT = 20  # updates that the mean is taken over


class Pace:
    """The mean duration of the last updates, from the end of one to the end of the next; validation is not counted.

    Updates that a resumed run has behind it were not timed here, and count for nothing.

    Args:
        recent: Updates that the mean is taken over, at most.
        clock: Seconds.
    """

    def __init__(self, recent: int = RECENT, clock: Callable[[], float] = time.monotonic) -> None:
        self._durations: deque[float] = deque(maxlen=recent)
        self._clock = clock
        self._begun: float | None = None
        self._paused: float | None = None

    def begin(self) -> None:
        """The time of the first update starts now; nothing if it has started."""
        if self._begun is None:
            self._begun = self._clock()

    def pause(self) -> None:
        """What happens from now on is no part of an update."""
        self._paused = self._clock()

    def go_on(self) -> None:
        """It is again."""
        if self._paused is not None and self._begun is not None:
            self._begun += self._clock() - self._paused
        self._paused = None

    def lap(self) -> None:
        """An update ends now, and the next begins."""
        if self._begun is not None:
            self._durations.append(self.spent())
            self._begun = self._clock()

    def spent(self) -> float:
        """Seconds in the update at work."""
        if self._begun is None:
            return 0.0
        return (self._clock() if self._paused is None else self._paused) - self._begun

    def left(self, updates: float) -> float | None:
        """Seconds that so many updates will take, the one at work among them; None before the first is done."""
        if not self._durations:
            return None
        mean = sum(self._durations) / len(self._durations)
        return max(0.0, mean * updates - self.spent())


def duration(seconds: float) -> str:
    """Seconds in words, by the two largest units.

    >>> [duration(seconds) for seconds in (0.4, 59.6, 200, 7500, 95000)]
    ['0 s', '1 min', '3 min 20 s', '2 h 5 min', '1 d 2 h']
    """
    whole, words = round(seconds), []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, whole = divmod(whole, size)
        if count:
            words.append(f"{count} {name}")
        elif words:
            break
    return " ".join(words[:2]) or "0 s"
