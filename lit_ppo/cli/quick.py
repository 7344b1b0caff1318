"""What the command answers at once, without PyTorch: help, version, and the configurations that come with it."""

import argparse
import shutil
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

from lit_ppo import __version__
from lit_ppo.cli import shipped
from lit_ppo.run.errors import CommandError

SUBCOMMANDS = {
    "fit": "train: supervised fine-tuning, a reward model, or PPO",
    "validate": "measure a model on the validation data",
    "test": "measure a model on the test data",
    "predict": "sample responses and score them",
    "memory": "say what a run of PPO will need, before it starts",
    "export": "write the model of a checkpoint in Hugging Face format",
    "ls": "list the configurations that come with lit-ppo",
    "cp": "copy one of them to edit it",
    "completion": "print a script with which the shell completes lit-ppo",
}
OVERVIEW = """\
usage: lit-ppo SUBCOMMAND [--config FILE_OR_NAME]... [--KEY VALUE]...

PPO for language models on PyTorch Lightning, in which every trick is a callback.

First steps:
  lit-ppo fit --config quickstart   all stages of RLHF on a CPU, without downloads
  tensorboard --logdir runs         watch the run in a browser
  lit-ppo ls                        see which jobs, tricks and monitors there are
  lit-ppo cp ppo my.yaml            copy a configuration, to edit it
  lit-ppo fit --config my.yaml --config tricks/adaptive_kl --trainer.max_steps 100

Subcommands:
{subcommands}

Options:
  --config FILE_OR_NAME   a file, or a name that 'lit-ppo ls' lists; later ones are applied on top of earlier ones
  --KEY VALUE             any key of a configuration, such as --trainer.max_steps 100
  --ckpt_path last        resume the newest run ('auto': or start one)
  --print_config          print the configuration with all defaults, and run nothing
  --debug                 show tracebacks of errors
  --version, --help

Help on one subcommand or class: lit-ppo fit --help, lit-ppo fit --model.help LitPPO
"""
MEMORY = """\
usage: lit-ppo memory [--config FILE_OR_NAME]... [--KEY VALUE]...

Prints what each process of a PPO run will need, phase by phase, and which settings lower the largest parts. Takes the
arguments of lit-ppo fit, and starts nothing: it reads configurations of models, but no weights.

  lit-ppo memory --config ppo
  lit-ppo memory --config ppo --config lora --trainer.precision bf16-mixed
  lit-ppo memory --config ppo --config strategy/fsdp2 --trainer.devices 8
"""


class Parser(argparse.ArgumentParser):
    """A parser of a small subcommand, with errors in the command's form."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{self.prog.removeprefix('lit-ppo ')}: {message}; see {self.prog} --help", exit_code=2)


def answer(arguments: list[str]) -> bool:
    """Do what needs no library.

    Args:
        arguments: Of the command.

    Returns:
        Whether that was all.

    Raises:
        CommandError: The subcommand is unknown, or one of its arguments is wrong.
    """
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        rows = "\n".join(f"  {name:{max(map(len, SUBCOMMANDS))}}   {text}" for name, text in SUBCOMMANDS.items())
        print(OVERVIEW.format(subcommands=rows), end="")
    elif first == "--version":
        print(f"lit-ppo {__version__}")
    elif first == "memory" and (len(arguments) == 1 or {"-h", "--help"} & set(arguments)):
        print(MEMORY, end="")
    elif first == "ls":
        _list(arguments[1:])
    elif first == "cp":
        _copy(arguments[1:])
    elif not first.startswith("-") and first not in SUBCOMMANDS:
        from lit_ppo.cli.errors import nearest

        raise CommandError(f"{first}: no such subcommand; {nearest(first, SUBCOMMANDS)}", exit_code=2)
    else:
        return False
    return True


def _list(arguments: list[str]) -> None:
    parser = Parser("lit-ppo ls", description="Lists the configurations that come with lit-ppo.", allow_abbrev=False)
    parser.add_argument("word", nargs="?", default="", help="List only those with this word in name or description.")
    word = parser.parse_args(arguments).word
    found = {name: shipped.comment(name) for name in shipped.names()}
    found = {name: text for name, text in found.items() if word.lower() in f"{name} {text}".lower()}
    if not found:
        raise CommandError(f"ls {word}: no configuration has this word; 'lit-ppo ls' lists all", exit_code=2)
    width = max(map(len, found))
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for kind, title in shipped.KINDS.items():
        rows = [(name, text) for name, text in found.items() if shipped.kind(name) == kind]
        if rows:
            print(f"{title}:")
        for name, text in rows:
            indent = f"  {name:{width}}  "
            print(textwrap.fill(text, max(columns, 60), initial_indent=indent, subsequent_indent=" " * len(indent)))
    print("\nRun one:  lit-ppo fit --config NAME    Copy one, to edit it:  lit-ppo cp NAME FILE")


def _copy(arguments: list[str]) -> None:
    parser = Parser(
        "lit-ppo cp", description="Copies a configuration that comes with lit-ppo, to edit it.", allow_abbrev=False
    )
    parser.add_argument("name", help="Its name, as 'lit-ppo ls' lists it.")
    parser.add_argument("file", type=Path, nargs="?", default=Path(), help="File or folder; by default this folder.")
    parser.add_argument("--force", action="store_true", help="Replace an existing file.")
    given = parser.parse_args(arguments)
    file = shipped.copy(given.name, given.file, force=given.force)
    job = "" if shipped.is_job(given.name.removesuffix(".yaml")) else "--config ppo "
    print(f"Copied {given.name} to {file}. Run it with: lit-ppo fit {job}--config {file}")
