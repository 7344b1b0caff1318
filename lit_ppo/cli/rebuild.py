"""The module of a checkpoint, built from the configuration inside it, which may not run code on its own."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from lit_ppo.ppo.module import LitPPO
from lit_ppo.run.errors import CommandError
from lit_ppo.shown import message_of, shown
from lit_ppo.supervised.base import SupervisedModule
from lit_ppo.supervised.critic import LitCritic
from lit_ppo.supervised.reward_model import LitRewardModel
from lit_ppo.supervised.sft import LitSFT

OWN: dict[str, type[L.LightningModule]] = {cls.__name__: cls for cls in (LitPPO, LitSFT, LitRewardModel, LitCritic)}
# arguments that an export has no use for; most are classes and functions
UNUSED: dict[type, set[str]] = {
    LitPPO: {
        "critic", "critic_lora", "reference", "reference_dtype", "rewards", "eval_rewards", "advantages", "engine",
        "rollout_ahead", "actor_optimizer", "critic_optimizer", "actor_scheduler", "critic_scheduler",
    },
    SupervisedModule: {"optimizer", "scheduler"},
}  # fmt: skip
# stand in for arguments that an export has no use for either, but that have no default
STAND_INS: dict[type, dict[str, Any]] = {LitCritic: {"rewards": "lit_ppo.cli.rebuild.unknown_reward"}}
# arguments of from_pretrained with which it runs code
RUN_CODE = {
    "trust_remote_code", "code_revision", "weights_only", "attn_implementation", "experts_implementation",
    "use_kernels", "kernel_config", "allow_all_kernels",
}  # fmt: skip
HARMLESS = ("lit_ppo.", "torch.optim.")  # modules whose classes may be arguments of a trusted class


def build(
    config: dict[str, Any],
    *,
    where: str = "checkpoint",
    trust_remote_code: bool = False,
    trusted: Sequence[str] = (),
) -> Any:
    """Build the module that a checkpoint's configuration describes; of its models, only what an export needs.

    Args:
        config: The run's configuration.
        where: Argument with the checkpoint, for messages.
        trust_remote_code: Run the code in the model's folder.
        trusted: Names of classes, other than lit-ppo's, that may be imported and built.

    Raises:
        CommandError: The configuration is damaged, names a class that is not trusted, or the class saves no model.
    """
    name, arguments = _class_and_arguments(where, config.get("model"))
    own = OWN.get(name.rpartition(".")[2]) if name.startswith("lit_ppo.") or "." not in name else None
    cls: Any = own or _import_trusted(where, name, trusted)
    if not isinstance(cls, type):
        raise CommandError(f"--trust_class {shown(name, 120)}: is no class; {_DAMAGED}")
    unused = {argument for base, names in UNUSED.items() if issubclass(cls, base) for argument in names}
    arguments = {argument: value for argument, value in arguments.items() if argument not in unused}
    for base, stand_ins in STAND_INS.items():
        arguments |= stand_ins if issubclass(cls, base) else {}
    if issubclass(cls, LitPPO | SupervisedModule):
        kept = {k: v for k, v in (arguments.get("model_kwargs") or {}).items() if k not in RUN_CODE}
        arguments["model_kwargs"] = {**kept, "trust_remote_code": trust_remote_code}
    try:
        module = cls(**arguments) if own else _parsed(where, name, arguments, trusted)
    except TypeError as error:
        raise CommandError(
            f"{where}: its configuration does not fit {name} ({message_of(error, 80)}); {_DAMAGED}"
        ) from error
    if not hasattr(module, "save_pretrained"):
        raise CommandError(f"{name} has no save_pretrained(dirpath): nothing to export")
    if hasattr(module, "only_actor"):
        module.only_actor()
    return module


def unknown_reward(responses: Sequence[str]) -> list[float]:
    """The reward of a critic that is only exported."""
    raise NotImplementedError


def _class_and_arguments(where: str, model: Any) -> tuple[str, dict[str, Any]]:
    name, arguments = (model.get("class_path"), model.get("init_args")) if isinstance(model, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(arguments or {}, dict):
        raise CommandError(f"{where}: its configuration has no model with class_path and init_args; {_DAMAGED}")
    return name, dict(arguments or {})


_DAMAGED = "give a checkpoint that lit-ppo wrote"


def _import_trusted(where: str, name: str, trusted: Sequence[str]) -> Any:
    if name not in trusted:
        quoted = shown(name, 120)
        raise CommandError(
            f"{where}: its configuration names the class {quoted}, and to import it runs code; if you trust the class "
            f"and the checkpoint, add --trust_class {quoted}"
        )
    sys.path.insert(0, os.getcwd())
    try:
        cls = resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CommandError(f"--trust_class {shown(name, 120)}: cannot be imported ({message_of(error, 80)})") from error
    finally:
        sys.path.remove(os.getcwd())
    return cls


def _parsed(where: str, name: str, arguments: dict[str, Any], trusted: Sequence[str]) -> Any:
    """An object of a trusted class. Classes among its arguments are trusted by name as well."""
    for inner in _class_paths(arguments):
        if not inner.startswith(HARMLESS):
            _import_trusted(where, inner, trusted)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    with _no_modules_of_working_directory():  # the parser imports what a string names where a function is expected
        parsed = parser.parse_object({"model": {"class_path": name, "init_args": arguments}})
    return parser.instantiate(parsed).model


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "class_path" in value:
            yield str(value["class_path"])
        yield from (path for item in value.values() for path in _class_paths(item))
    elif isinstance(value, list):
        yield from (path for item in value for path in _class_paths(item))


@contextlib.contextmanager
def _no_modules_of_working_directory() -> Iterator[None]:
    """Modules of the working directory are not found, unless they are imported already."""
    before, here = list(sys.path), Path.cwd()
    sys.path[:] = [entry for entry in before if entry and Path(entry).resolve() != here]
    try:
        yield
    finally:
        sys.path[:] = before
