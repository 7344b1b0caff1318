"""A sign of life at least every few seconds, whatever the command is busy with."""

import contextlib
import threading
import time
from collections.abc import Callable
from types import TracebackType

from lit_ppo.cli.pace import duration


class Heartbeat:
    """Prints what the command is doing when nothing else has been printed for ``quiet`` seconds.

    Args:
        quiet: Seconds of silence after which a line is printed.
        enabled: False prints nothing, for output that others parse and for launched ranks.

    ``doing`` is a text, which is told with the time since it was set, or a function that gives one. ``redraw``, called
    every second, updates what stands on a terminal, and says whether it could.
    """

    def __init__(self, quiet: float = 6.0, *, enabled: bool = True) -> None:
        self.quiet = quiet
        self.enabled = enabled
        self._last = time.monotonic()
        self.doing = "starting"
        self.redraw: Callable[[], bool] = lambda: False
        self._done = threading.Event()

    @property
    def doing(self) -> str | Callable[[], str]:
        """What is going on."""
        return self._doing

    @doing.setter
    def doing(self, doing: str | Callable[[], str]) -> None:
        self._doing, self._since = doing, time.monotonic()

    def __enter__(self) -> "Heartbeat":
        """Start the thread that watches."""
        if self.enabled:
            threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stop it."""
        self._done.set()

    def say(self, text: str, doing: str | None = None) -> None:
        """Print a line now, and go on saying it (or ``doing``) while nothing else happens."""
        self.doing = doing or text
        if self.enabled:
            self.touch()
            print(text, flush=True)

    def touch(self) -> None:
        """Something was printed just now."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            with contextlib.suppress(Exception):  # what it describes is changing under it in another thread
                if self.redraw():
                    self.touch()
            if time.monotonic() - self._last >= self.quiet:
                text = self._text()
                self.touch()
                print(text, flush=True)

    def _text(self) -> str:
        doing, spent = self.doing, time.monotonic() - self._since
        try:
            since = f" {duration(spent)}" if spent > 0.5 and not callable(doing) else ""
            return f"{doing() if callable(doing) else doing} ...{since}"
        except Exception as error:  # as above
            return f"working ({type(error).__name__} while asking for details) ..."
