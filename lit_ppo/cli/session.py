"""One run of the command: exit code, last line, and what an interrupt needs to know."""

import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from lit_ppo.cli.errors import running_error
from lit_ppo.cli.heartbeat import Heartbeat
from lit_ppo.run.errors import CommandError
from lit_ppo.run.stop import Interrupts, is_first_process


class Session:
    """One run of the command.

    Args:
        arguments: Arguments of the command line, without ``--debug``.
        debug: Print tracebacks of errors.
    """

    def __init__(self, arguments: list[str], *, debug: bool) -> None:
        self.arguments = arguments
        self.debug = debug
        self.checkpoints: Path | None = None  # folder in which this run saves, once that is known
        parsed_only = any(a in ("-h", "--help") or a.startswith(("--help=", "--print_config")) for a in arguments)
        self.heartbeat = Heartbeat(enabled=bool(arguments) and not parsed_only and is_first_process())
        self.interrupts = Interrupts(self.say_how_to_continue)

    def run(self, work: Callable[["Session"], None]) -> int:
        """Run ``work``; turn its end, an error or an interrupt into an exit code and a last line."""
        with self.heartbeat, self.interrupts as interrupts:
            code = 0
            try:
                work(self)
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

    def say_error(self, error: Exception) -> None:
        """Print the last line of standard error: place, value and remedy."""
        if self.debug:
            traceback.print_exception(error)
        sys.stdout.flush()
        print(f"lit-ppo: error: {running_error(error)}", file=sys.stderr, flush=True)

    def say_how_to_continue(self) -> None:
        """Print the last line after an interrupt: the command that continues this run."""
        if "LIT_PPO_STAGE" in os.environ or not is_first_process():
            return
        arguments = self.arguments
        if self.checkpoints is not None and any(self.checkpoints.glob("*.ckpt")):
            arguments = [*_without_ckpt_path(arguments), "--ckpt_path", "last"]
        command = shlex.join(["lit-ppo", *arguments])
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
