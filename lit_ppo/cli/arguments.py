"""The command's parser, its help, and what is checked and completed in a configuration once it is parsed."""

import os
import re
from argparse import Action, ArgumentError
from collections.abc import Iterable
from importlib import import_module
from pkgutil import resolve_name
from typing import Any

import jsonargparse._typehints
import yaml
from jsonargparse import ActionConfigFile, DefaultHelpFormatter, Namespace, set_loader  # type: ignore[attr-defined]
from jsonargparse._actions import _ActionConfigLoad, _ActionHelpClassPath
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser

from lit_ppo.cli.layers import layers, load
from lit_ppo.run.arguments import check_command, check_trainer
from lit_ppo.run.errors import CommandError

MODE = "yaml that says one thing"  # of the parser; its own "yaml" takes the last of two equal keys
set_loader(MODE, load, exceptions=(yaml.YAMLError,))
NAMES = 8  # classes that the help of an argument names
LONGEST_TYPE = 60  # characters; what a longer type means is in the docstring
KNOWN = re.compile(r", known subclasses: (.*)\)", re.DOTALL)


class LayeredParser(LightningArgumentParser):
    """A parser whose configuration files may have a ``base``, and in which another class starts without arguments.

    The parser's own nested ``config`` key merges plain values only: a class of the lower file keeps its arguments. It
    also tries all types of a union on one mapping, which each may change: ``kwargs`` of a named reward were lost.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        jsonargparse._typehints.discard_init_args_on_class_path_change = _discard_arguments
        jsonargparse._typehints.pristine_value = _copy
        super().__init__(*args, **{"formatter_class": ShortHelp, **kwargs, "parser_mode": MODE})

    def _check_value_key(self, action: Any, value: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        """Refuse what is not a mapping for a group; jsonargparse lets it replace the group's earlier keys."""
        if isinstance(action, _ActionConfigLoad) and not isinstance(value, dict | Namespace | str):
            raise TypeError(f'Parser key "{key}": Unable to load config "{value}"')  # in the parser's own words
        return super()._check_value_key(action, value, key, *args, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = _LayeredConfigFile
            kwargs["help"] = "A file, or a name that 'lit-ppo ls' lists; later ones are applied on top of earlier ones."
        return super().add_argument(*args, **kwargs)


def _copy(value: Any) -> Any:
    """A value whose mappings and lists may be changed."""
    if isinstance(value, Namespace):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _discard_arguments(parser: Any, previous: Any, value: Any) -> None:
    """Drop all arguments of the previous class of a setting where another class takes its place.

    jsonargparse 4 keeps those whose names the new class knows too: SGD would get AdamW's weight decay.
    """
    if not previous or not previous.get("init_args"):
        return
    names = previous["class_path"], value["class_path"]
    if names[0] != names[1] and (None in names or resolve_name(names[0]) is not resolve_name(names[1])):
        for name in list(vars(previous["init_args"])):
            del previous["init_args"][name]


class _LayeredConfigFile(ActionConfigFile):
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        files = layers(values)
        for file in files:
            try:
                self.apply_config(parser, cfg, self.dest, file)
            except AttributeError as error:  # "config" in the file has no files
                raise CommandError(f"{file}: config: must be a path; use base instead", exit_code=2) from error
            except (TypeError, KeyError, ArgumentError) as error:
                error.file = file if os.path.isfile(file) else "--config"  # type: ignore[union-attr]  # for the message
                raise
            if len(files) > 1:
                cfg.pop("base", None)


class ShortHelp(DefaultHelpFormatter):
    """Without a usage that repeats all arguments, entries for help on classes, and long lists of classes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "max_help_position": 12})  # type: ignore[no-untyped-call]
        self._with_help: set[str] = set()  # arguments with an entry for help on their classes

    def add_usage(self, usage: str | None, actions: Iterable[Action], *args: Any, **kwargs: Any) -> None:
        actions = list(actions)
        needed = [action for action in actions if not action.option_strings]
        short = usage or ("%(prog)s [options]" if len(actions) > 8 and not needed else None)
        super().add_usage(short, actions, *args, **kwargs)

    def add_arguments(self, actions: Iterable[Action]) -> None:
        actions = list(actions)
        helps = [action for action in actions if isinstance(action, _ActionHelpClassPath)]
        self._with_help |= {option.removesuffix(".help") for action in helps for option in action.option_strings}
        super().add_arguments([action for action in actions if action not in helps])

    def _get_help_string(self, action: Action) -> str:
        return KNOWN.sub(lambda found: f", known: {_some(found[1].split(', '))})", super()._get_help_string(action))

    def _get_type_str(self, action: Action) -> str | None:
        text = super()._get_type_str(action)
        return None if text and len(text) > LONGEST_TYPE else text

    def format_help(self) -> str:
        text = super().format_help()
        if not self._with_help:
            return text
        example = f"{min(self._with_help)}.help NAME"
        return f"{text}\nFor help on one class of an argument, add ARGUMENT.help NAME, such as {example}\n"


def _some(paths: list[str]) -> str:
    """Names of a few classes, those of this package first.

    >>> _some(["torch.optim.Adam", "lit_ppo.GAE", "torch.optim.Adam"])
    'GAE, Adam'
    """
    paths = [path for path in sorted(paths, key=lambda path: not path.startswith("lit_ppo.")) if path]
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    return ", ".join(names[:NAMES]) + (", ..." if len(names) > NAMES else "")


def complete(config: Namespace, *, trains: bool = True) -> bool:
    """Check groups and arguments, use public names of classes, and hand ``data_root`` to the data that take it.

    Args:
        config: Of a subcommand.
        trains: Whether that is ``fit``.

    Returns:
        False if ``data_root`` is given, but neither the data module nor data of a callback takes it.

    Raises:
        CommandError: A group is not a mapping, or an argument has a value that the parser accepts and the run does not.
    """
    for group in ("trainer", "checkpoint", "export", "report"):
        if not isinstance(config.get(group), Namespace):
            raise CommandError(f"{group}: {config.get(group)!r} is not a mapping; give its keys below it", exit_code=2)
    try:
        check_command(config)
        check_trainer(vars(config.trainer), trains=trains)
    except ValueError as error:
        raise CommandError(str(error), exit_code=2) from error
    callbacks = config.trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, Namespace) and resolve_name(callback.class_path) is Callback:  # also of {}
            raise CommandError("trainer.callbacks: a callback has no class; give its class_path", exit_code=2)
    _use_fsdp2(config.trainer)
    _use_public_names(config)
    return _hand_over_data_root(config)


def _use_fsdp2(trainer: Namespace) -> None:
    """Replace Lightning's name for the first version of FSDP, and refuse its class."""
    strategy = trainer.get("strategy")
    if strategy == "fsdp":
        trainer.strategy = "fsdp2"
    elif isinstance(strategy, Namespace) and strategy.class_path.endswith(".FSDPStrategy"):
        raise CommandError(
            "--trainer.strategy FSDPStrategy: the first version of FSDP is not supported; use fsdp2", exit_code=2
        )


def _use_public_names(value: Any) -> None:
    """Name classes of this package as users import them: then saved configurations outlive a move of a module."""
    if isinstance(value, Namespace | dict):
        path = value.get("class_path")
        if isinstance(path, str) and path.startswith("lit_ppo."):
            value["class_path"] = public_name(path)
        for item in vars(value).values() if isinstance(value, Namespace) else value.values():
            _use_public_names(item)
    elif isinstance(value, list):
        for item in value:
            _use_public_names(item)


def public_name(path: str) -> str:
    """The shortest name by which a class can be imported.

    >>> public_name("lit_ppo.rewards.model.RewardModel")
    'lit_ppo.RewardModel'
    """
    cls, parts = resolve_name(path), path.split(".")
    packages = [".".join(parts[:length]) for length in range(1, len(parts))]
    found = [package for package in packages if getattr(import_module(package), parts[-1], None) is cls]
    return f"{found[0]}.{parts[-1]}"


def _hand_over_data_root(config: Namespace) -> bool:
    if config.data_root is None:
        return True
    callbacks = config.trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    found = [config.get("data"), *((callback.get("init_args") or {}).get("data") for callback in callbacks)]
    takers = [
        data.init_args for data in found if isinstance(data, Namespace) and "data_root" in data.get("init_args", {})
    ]
    for taker in takers:
        taker.data_root = config.data_root
    return bool(takers)
