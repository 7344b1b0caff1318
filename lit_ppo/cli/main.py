"""Entry point of the ``lit-ppo`` command.

The heavy libraries are imported only after the first line is printed, so that the command answers at once.
"""

import os
import sys

from lit_ppo.cli.quick import answer
from lit_ppo.cli.session import Session, restored_process
from lit_ppo.environment import keep_freed_memory, wait_without_spinning
from lit_ppo.run.errors import CommandError
from lit_ppo.validate import needs_package

PARSER = ("jsonargparse", "docstring_parser", "typeshed_client")  # what only the command imports


def main(args: list[str] | None = None) -> int:
    """Run the command.

    Args:
        args: Its arguments; None takes those of the process.

    Returns:
        The exit code: 0; 1 for an error in the run, 2 for one in the arguments; 130 after Ctrl-C, 143 after SIGTERM.
    """
    given = list(sys.argv[1:] if args is None else args)
    if args is None:  # else the process is somebody else's
        keep_freed_memory()
    session = Session([argument for argument in given if argument != "--debug"], debug="--debug" in given)
    with restored_process(imports_here=session.arguments[:1] != ["export"]):
        code = session.run(_work)
    if args is None and (session.interrupts.received is not None or session.lost_ranks):
        sys.stdout.flush()
        os._exit(code)  # do not wait for threads of other libraries, which may also have something to say
    return code


def _work(session: Session) -> None:
    """Answer at once, or import the libraries, which takes seconds, and run the subcommand."""
    try:
        if answer(session.arguments):
            sys.stdout.flush()
            return
    except BrokenPipeError:  # the reader has enough, as of ``lit-ppo ls | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    _check_packages()
    wait_without_spinning()
    session.heartbeat.say("lit-ppo: loading PyTorch, transformers and Lightning", doing="loading libraries")
    from lit_ppo.cli.command import Command
    from lit_ppo.cli.export_command import export

    if not sys.stdout.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # progress bars are for terminals
    subcommand, *arguments = session.arguments
    if subcommand == "export":
        export(arguments)
    elif subcommand == "completion":
        from lit_ppo.cli.completion import completion

        completion(arguments, session)
    elif subcommand == "memory":
        from lit_ppo.console.memory import say_memory

        session.arguments = ["fit", *arguments]
        Command(session, instead=say_memory)
    else:
        Command(session)


def _check_packages() -> None:
    try:
        needs_package("the command", *PARSER, install="'jsonargparse[signatures]'")
    except ImportError as error:
        raise CommandError(f"{error}; scripts that import lit_ppo do without") from error
