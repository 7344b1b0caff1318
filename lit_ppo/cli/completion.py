"""``lit-ppo completion``: a script with which the shell completes subcommands, options and names of configurations."""

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lit_ppo.cli import shipped
from lit_ppo.cli.command import Command
from lit_ppo.cli.quick import SUBCOMMANDS, Parser
from lit_ppo.cli.session import Session
from lit_ppo.run.errors import CommandError

FUNCTIONS = {  # that complete the value of --config, and the argument of cp
    "bash": """
_lit_ppo_names() {{ compgen -W "{names}" -- "$1"; }}
_lit_ppo_configs() {{ _lit_ppo_names "$1"; compgen -f -- "$1"; }}
""",
    "zsh": """
_lit_ppo_names() {{ compadd -- {names} }}
_lit_ppo_configs() {{ _lit_ppo_names; _files }}
""",
}
NAMES = dict.fromkeys(FUNCTIONS, "_lit_ppo_names")
CONFIGS = dict.fromkeys(FUNCTIONS, "_lit_ppo_configs")


def completion(arguments: list[str], session: Session) -> None:
    """Print the script.

    Args:
        arguments: Arguments after ``completion``.
        session: This run of the command.

    Raises:
        CommandError: The shell is not one of the two, or shtab is not installed.
    """
    parser = Parser("lit-ppo completion", description="Prints a completion script for a shell.", allow_abbrev=False)
    parser.add_argument("shell", choices=sorted(FUNCTIONS))
    shell = parser.parse_args(arguments).shell
    try:
        import shtab
    except ImportError as error:
        raise CommandError("completion: needs the package shtab; pip install 'lit-ppo[completion]'") from error
    del shtab
    session.arguments = ["fit"]
    _Script(session, shell)


class _Script(Command):
    """The command up to its parser, whose completion it prints."""

    def __init__(self, session: Session, shell: str) -> None:
        self.shell = shell
        super().__init__(session)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        subcommands: Any = parser._subcommands_action
        for name in SUBCOMMANDS.keys() - subcommands.choices.keys():
            if name == "memory":
                subcommands.add_subcommand(name, self._parser("fit"), help=SUBCOMMANDS[name])
                continue
            other = type(parser)(description=SUBCOMMANDS[name])
            if name == "cp":
                other.add_argument("name").complete = NAMES
            elif name == "completion":
                other.add_argument("shell", choices=sorted(FUNCTIONS))
            subcommands.add_subcommand(name, other, help=SUBCOMMANDS[name])
        for each in (parser, *subcommands._name_parser_map.values()):  # zsh asks the command's own options first
            for action in each._actions:
                if action.dest == "config":
                    action.complete = CONFIGS
        for name, each in subcommands._name_parser_map.items():
            each.description = SUBCOMMANDS[name]
        functions = FUNCTIONS[self.shell].format(names=" ".join(shipped.names()))
        script = parser.get_completion_script(f"shtab-{self.shell}", preambles=[functions])
        print(script.replace('\n  {-c,--config}"[', '\n  "*"{-c,--config}"['))  # zsh: may be given again
        raise SystemExit(0)
