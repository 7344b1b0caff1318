"""One run of the command: exit code, last line, what an interrupt needs to know, and what changes in the process."""

import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_ppo.console.heartbeat import Heartbeat
from lit_ppo.run.errors import CommandError, is_meant, running_error
from lit_ppo.run.stop import Interrupts, is_first_process
from lit_ppo.shown import escaped

LIGHTNING_LOG = logging.getLogger("lightning.pytorch.utilities.rank_zero")


class Session:
    """One run of the command.

    Args:
        arguments: Arguments of the command line, without ``--debug``.
        debug: Print tracebacks of errors.
    """

    def __init__(self, arguments: list[str], *, debug: bool) -> None:
        self.arguments = arguments
        self.debug = debug
        self.lost_ranks = False  # whether the run has ended since another rank is gone
        self.checkpoints: Path | None = None  # folder in which this run saves, once that is known
        self.resumes_with: list[str] | None = None  # arguments that resume this run, if they are others than its own
        parsed_only = arguments[:1] == ["completion"] or any(
            a in ("-h", "--help") or a.startswith(("--help=", "--print_config")) for a in arguments
        )
        self.heartbeat = Heartbeat(enabled=bool(arguments) and not parsed_only and is_first_process())
        self.discard: Callable[[], None] = lambda: None  # removes the folder of a run that has not begun
        self.explain: Callable[[BaseException], str | None] = lambda error: None  # set once there are ranks
        self.interrupts = Interrupts(self.say_how_to_continue)

    def run(self, work: Callable[["Session"], None]) -> int:
        """Run ``work``; turn its end, an error or an interrupt into an exit code and a last line."""
        with self.heartbeat, self.interrupts as interrupts:
            code = 0
            try:
                work(self)
            except SystemExit as stop:
                is_interrupt = isinstance(stop.__context__, KeyboardInterrupt)  # Lightning has made an exit of it
                if interrupts.received is None and (is_interrupt or not is_meant(stop)):
                    code = 1
                    self.say_error(stop.__context__ if is_interrupt and stop.__context__ else stop)
                else:
                    code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException as error:  # also of other people's code, which may raise anything
                code = error.exit_code if isinstance(error, CommandError) else 1
                if interrupts.received is None:
                    self.say_error(error)
            if code or interrupts.received is not None:
                self.discard()
            if interrupts.received is not None:
                interrupts.end_children()
                self.say_how_to_continue()
                code = interrupts.exit_code
            return code

    def say_error(self, error: BaseException) -> None:
        """Print the last line of standard error: place, value and remedy."""
        if self.debug:
            print(escaped("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        sys.stdout.flush()
        explained = self.explain(error)
        print(f"lit-ppo: error: {explained or running_error(error)}", file=sys.stderr, flush=True)
        self.lost_ranks = explained is not None

    def say_how_to_continue(self) -> None:
        """Print the last line after an interrupt: the command that continues this run."""
        if "LIT_PPO_STAGE" in os.environ or not is_first_process():
            return
        arguments = self.arguments
        if self.checkpoints is not None and any(self.checkpoints.glob("*.ckpt")):
            arguments = [*_without_ckpt_path(self.resumes_with or arguments), "--ckpt_path", "last"]
        command = escaped(shlex.join(["lit-ppo", *arguments]))
        sys.stdout.flush()
        print(f"lit-ppo: interrupted; continue with: {command}", file=sys.stderr, flush=True)


def _without_ckpt_path(arguments: list[str]) -> list[str]:
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--ckpt_path":
            next(words, None)
        elif not word.startswith("--ckpt_path="):
            kept.append(word)
    return kept


@contextmanager
def restored_process(*, imports_here: bool = True) -> Iterator[None]:
    """Set up import path, warnings and Lightning's log for one run; restore them and the environment afterwards.

    A second call in the same process then starts from the same state.

    Args:
        imports_here: Modules of the working directory are found, since configurations may name them.
    """
    environment, path, filters = dict(os.environ), list(sys.path), list(LIGHTNING_LOG.filters)
    if imports_here and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    LIGHTNING_LOG.addFilter(lambda record: "Tip: For seamless" not in record.getMessage())  # an advertisement
    try:
        with warnings.catch_warnings():
            # raised by Lightning 2.6 with torch 2.13; users can do nothing about it
            warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
            _show_own_warnings_without_place()
            yield
    finally:
        LIGHTNING_LOG.filters[:] = filters
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path


def _show_own_warnings_without_place() -> None:
    """Print warnings of this package as one line, without the place in our source; ``catch_warnings`` undoes it."""
    show_other = warnings.showwarning

    def show(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None
    ) -> None:
        if Path(filename).is_relative_to(Path(__file__).parents[1]):
            print(f"lit-ppo: warning: {escaped(str(message))}", file=file or sys.stderr, flush=True)
        else:
            show_other(message, category, filename, lineno, file, line)

    warnings.showwarning = show
