"""Signs of life: a thread that says what the command is doing while nothing else is printed."""

import contextlib
import threading
import time
from collections.abc import Callable

from lit_ppo.shown import escaped


def duration(seconds: float) -> str:
    """Seconds in the two largest units.

    >>> duration(59.6), duration(200), duration(7500)
    ('1 min 0 s', '3 min 20 s', '2 h 5 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Heartbeat:
    """Prints what the command is doing after ``quiet`` seconds without other output.

    While ``tick`` is set, it is called every second instead: a progress bar redraws its line with it.

    Args:
        quiet: Seconds of silence before a line is printed.
        enabled: False prints nothing: for output that programs parse, and for launched ranks.
    """

    def __init__(self, quiet: float = 6.0, *, enabled: bool = True) -> None:
        self.quiet, self.enabled, self.clock = quiet, enabled, time.monotonic
        self.tick: Callable[[], object] | None
        self._stop = threading.Event()
        self.begin("starting")
        self.touch()

    def __enter__(self) -> "Heartbeat":
        if self.enabled:
            threading.Thread(target=self._run, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def begin(self, doing: str) -> None:
        """From now on, signs of life say ``doing`` and for how long."""
        self.tick, self._doing, self._since = None, doing, self.clock()

    def say(self, text: str, doing: str | None = None) -> None:
        """Print a line now and begin ``doing``, by default what the line says."""
        self.begin(doing or text)
        if self.enabled:
            self.touch()
            print(escaped(text), flush=True)

    def touch(self) -> None:
        """Restart the count of silent seconds: something was printed."""
        self._printed = self.clock()

    def beat(self) -> None:
        """Print or redraw what is due; the thread calls this every second."""
        if self.tick is not None:
            self.touch()
            with contextlib.suppress(Exception):  # the run changes while this thread reads its state
                self.tick()
        elif self.clock() - self._printed >= self.quiet:
            self.touch()
            print(f"{escaped(self._doing)} ... {duration(self.clock() - self._since)}", flush=True)

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            self.beat()
