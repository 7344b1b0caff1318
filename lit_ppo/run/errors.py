"""An error that ends the command with a one-line message, and words for errors of other code during a run."""

import errno
import traceback

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
