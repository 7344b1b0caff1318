"""An exception as one line."""

import traceback


def running_error(error: BaseException) -> str:
    """An exception raised while building or running, as one line.

    Errors that this package raises on purpose are complete; of others, type and place are named as well.
    """
    causes = [error]  # the parser wraps errors of the classes that it builds
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    error = next((each for each in causes if not _module_of(each).startswith("jsonargparse")), error)
    message, module = on_one_line(str(error)), _module_of(error)
    unintended = (LookupError, AttributeError, NameError, AssertionError, ImportError)
    if message and module.partition(".")[0] == "lit_ppo" and not isinstance(error, unintended):
        return message
    *_, line = [0, *(number for _, number in traceback.walk_tb(error.__traceback__))]
    place = f" in {module}, line {line}" if module else ""
    return f"{type(error).__name__}{place}: {message or 'no message'}; run again with --debug for the traceback"


def _module_of(error: BaseException) -> str:
    """Name of the module that raised it."""
    *_, module = ["", *(frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))]
    return str(module)


def on_one_line(text: str) -> str:
    """On one line, with control characters escaped: a terminal must not obey a response in it."""
    flat = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in flat)
