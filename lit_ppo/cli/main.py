"""The ``lit-ppo`` command: its first words, its exit code and its last line.

Nothing heavy is imported here, so that the command speaks at once.
"""

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

from lit_ppo.cli.errors import running_error
from lit_ppo.cli.heartbeat import Heartbeat
from lit_ppo.run.errors import CommandError
from lit_ppo.run.stop import Interrupts, is_first_process

LIGHTNING_LOG = logging.getLogger("lightning.pytorch.utilities.rank_zero")


def main(args: list[str] | None = None) -> int:
    """Run the command.

    Args:
        args: Its arguments; None: those of the process.

    Returns:
        The exit code: 0; 1 for an error in the run and 2 for one in the arguments; 130 after Ctrl-C, 143 after SIGTERM.
    """
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given
    session = Session([argument for argument in given if argument != "--debug"], debug=debug)
    with process_state():
        code = session.run()
    if args is None and session.interrupts.received is not None:
        os._exit(code)  # asked to go: no waiting for what else there is in the process
    return code


class Session:
    """One run of the command.

    Args:
        arguments: Of the command line.
        debug: Print tracebacks.
    """

    def __init__(self, arguments: list[str], *, debug: bool) -> None:
        self.arguments = arguments
        self.debug = debug
        self.checkpoints: Path | None = None  # where this run saves, once that is known
        parsed_only = any(a in ("-h", "--help") or a.startswith(("--help=", "--print_config")) for a in arguments)
        self.heartbeat = Heartbeat(enabled=bool(arguments) and not parsed_only and is_first_process())
        self.interrupts = Interrupts(self.say_how_to_continue)

    def run(self) -> int:
        """Run it, and turn whatever ends it into an exit code and a last line."""
        with self.heartbeat, self.interrupts as interrupts:
            try:
                self.work()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except KeyboardInterrupt:
                code = interrupts.exit_code
            except Exception as error:
                code = error.exit_code if isinstance(error, CommandError) else 1
                if interrupts.received is None:
                    self.say_error(error)
            if interrupts.received is not None:
                interrupts.end_children()
                self.say_how_to_continue()
                code = interrupts.exit_code
            return code

    def work(self) -> None:
        """Import what takes seconds to import, then parse, build and run."""
        self.heartbeat.say("lit-ppo: loading PyTorch, transformers and Lightning", doing="loading libraries")
        from lit_ppo.cli.command import Command

        warnings.formatwarning = _worded(warnings.formatwarning)
        if not sys.stdout.isatty():
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()  # bars are for terminals
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))  # configurations may name modules that lie there
        if self.arguments[:1] == ["export"]:
            from lit_ppo.cli.export_command import export

            export(self.arguments[1:])
        else:
            Command(self)

    def say_error(self, error: Exception) -> None:
        """The last line of standard error: place, value and remedy."""
        if self.debug:
            traceback.print_exception(error)
        sys.stdout.flush()
        print(f"lit-ppo: error: {running_error(error)}", file=sys.stderr, flush=True)

    def say_how_to_continue(self) -> None:
        """The command that goes on from here: the last line after an interrupt."""
        if "LIT_PPO_STAGE" in os.environ or not is_first_process():
            return
        arguments = self.arguments
        if self.checkpoints is not None and any(self.checkpoints.glob("*.ckpt")):
            arguments = [*_without_ckpt_path(arguments), "--ckpt_path", "last"]
        sys.stdout.flush()
        print(
            f"lit-ppo: interrupted; continue with: {shlex.join(['lit-ppo', *arguments])}", file=sys.stderr, flush=True
        )


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
def process_state() -> Iterator[None]:
    """Put environment and import path back afterwards: a second call in the same process starts alike."""
    environment, path = dict(os.environ), list(sys.path)
    filters, worded = list(LIGHTNING_LOG.filters), warnings.formatwarning
    LIGHTNING_LOG.addFilter(_no_advertisement)
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 with torch 2.13; nothing that a user could do anything about.
            warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
            yield
    finally:
        LIGHTNING_LOG.filters[:], warnings.formatwarning = filters, worded
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path


def _worded(other: Callable[..., str]) -> Callable[..., str]:
    """What this package warns of in words alone: where that stands in its source helps nobody."""

    def worded(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        if Path(filename).is_relative_to(Path(__file__).parents[1]):
            return f"lit-ppo: warning: {message}\n"
        return other(message, category, filename, lineno, line)

    return worded


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()
