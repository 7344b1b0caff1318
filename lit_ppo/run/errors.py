"""Errors while building and running as one line, and an error that ends the command with one."""

import errno
import inspect
import re
import traceback
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, get_origin, is_typeddict

from lit_ppo.shown import message_of, on_one_line

CONNECTOR = "lightning.pytorch.trainer.connectors.checkpoint_connector"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENOTDIR)


class CommandError(Exception):
    """Ends the command with its message and exit code, without a traceback."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def restoring(error: BaseException, message: str) -> str:
    """The checkpoint that Lightning was restoring when an exception was raised, and which part; else empty."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_name
        if frame.f_globals.get("__name__") == CONNECTOR and name.startswith("restore_"):
            path = getattr(frame.f_locals.get("self"), "_ckpt_path", None)
            return (
                f"checkpoint {path}: its state of {name.removeprefix('restore_')} cannot be restored "
                f"({type(error).__name__}: {message}); give another checkpoint, or start a new run"
            )
    return ""


def of_the_disk(error: BaseException) -> str:
    """What a full, read-only or failing disk refuses, and what to do; empty for other errors."""
    if not isinstance(error, OSError) or error.errno not in DISK:
        return ""
    return (
        f"cannot read or write {error.filename or 'a file'} ({error.strerror}); free disk space, check permissions or "
        "choose another folder, then continue with --ckpt_path last"
    )


def running_error(error: BaseException) -> str:
    """An exception raised while building or running, as one line.

    Errors that this package raises on purpose are complete; of others, type and place are named as well.
    """
    error = _raised(error)
    module, text = module_of(error), message_of(error, length=2000)
    message = "" if text == type(error).__name__ else on_one_line(text)
    unintended = (LookupError, AttributeError, NameError, AssertionError, ImportError)
    if message and module.partition(".")[0] == "lit_ppo" and not isinstance(error, unintended):
        return message
    if argument := _trainer_argument(error, module, message):
        return f"Trainer({argument}): {message.rstrip('.;')}; correct it or leave it out"
    if problem := restoring(error, message) or of_the_disk(error):
        return problem
    frames = [(frame.f_globals.get("__name__"), number) for frame, number in traceback.walk_tb(error.__traceback__)]
    line = next((number for name, number in reversed(frames) if name == module), 0)
    place = f" in {module}, line {line}" if module else ""
    if isinstance(error, SystemExit):
        message = f"it called exit({message}) before the run had ended; raise an error there instead"
    return f"{type(error).__name__}{place}: {message or 'no message'}; run again with --debug for the traceback"


def is_meant(stop: SystemExit) -> bool:
    """Whether the parser, Lightning or this package ends the process, and not some other code that they have called."""
    return module_of(stop).partition(".")[0] in ("argparse", "jsonargparse", "lightning", "lit_ppo")


def _trainer_argument(error: BaseException, module: str, message: str) -> str:
    """The argument of the Trainer that Lightning refuses on purpose; empty if that is not what the error is."""
    if not module.startswith("lightning.") or isinstance(error, LookupError | AttributeError | ArithmeticError):
        return ""
    from lightning import Trainer

    names = inspect.signature(Trainer.__init__).parameters.keys() - {"self"}
    quoted = re.findall(r"`(?:Trainer\()?(\w+)|for (\w+),", message)
    return next((word for match in quoted for word in match if word in names), "")


def module_of(error: BaseException) -> str:
    """Name of the module that raised it."""
    names = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    others = ("_sitebuiltins", "importlib", "importlib._bootstrap")  # where exit() and import are
    return next((name for name in reversed(names) if name not in others), "")


def _raised(error: BaseException) -> BaseException:
    """What the code of a class raised, if the parser has wrapped it; else the error itself."""
    if not module_of(error).startswith("jsonargparse"):
        return error
    causes = alternatives(error) or [each for each in [error.__context__] if each is not None]
    found = (_raised(each) for each in causes)
    return next((each for each in found if not module_of(each).startswith("jsonargparse")), error)


def alternatives(error: BaseException) -> list[BaseException]:
    """What an error of jsonargparse came from; for a union, the error of each type that the value may mean.

    jsonargparse links only the error of the first type. The others are variables of the frame that raised.
    """
    *_, variables = [{}, *(frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__))]
    errors: list[BaseException] = variables.get("exceptions") or []
    if not errors:
        return [] if error.__cause__ is None else [error.__cause__]
    return _meant(list(zip(variables.get("subtypes", []), errors, strict=False)), variables.get("val")) or errors


def _meant(errors: list[tuple[Any, BaseException]], value: Any) -> list[BaseException]:
    """Of the types of a union, the errors of those that the keys of a mapping without a class mean; empty if unclear.

    >>> errors = [(dict[str, Any], ValueError("of one by name")), (int, ValueError("of a number"))]
    >>> _meant(errors, {"short": "my_rewards.short"}), _meant(errors, {"size": 3})
    ([ValueError('of one by name')], [])
    """
    given = _mapping(value)
    if not given or not given.keys().isdisjoint({"class_path", "init_args"}):
        return []
    entries = [error for kind, error in errors if is_typeddict(kind) and _close(given, kind.__annotations__)]
    named = [error for kind, error in errors if get_origin(kind) is dict]
    return entries or (named if all(_mapping(each) or _is_import_path(each) for each in given.values()) else [])


def _close(keys: Iterable[str], known: Iterable[str]) -> bool:
    """Whether a key is a known one, or a misspelt one."""
    return any(get_close_matches(str(key), known) for key in keys)


def _mapping(value: Any) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else getattr(value, "__dict__", None)


def _is_import_path(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", value) is not None
