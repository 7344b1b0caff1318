"""What the command changes in its process. A second call in the same process starts from the same state."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIGHTNING_LOG = logging.getLogger("lightning.pytorch.utilities.rank_zero")


@contextmanager
def restored_process() -> Iterator[None]:
    """Set up import path, warnings and Lightning's log for one run; restore them and the environment afterwards."""
    environment, path, filters = dict(os.environ), list(sys.path), list(LIGHTNING_LOG.filters)
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # configurations may name modules of the working directory
    LIGHTNING_LOG.addFilter(lambda record: "Tip: For seamless" not in record.getMessage())  # an advertisement
    try:
        with warnings.catch_warnings():
            # raised by Lightning 2.6 with torch 2.13; users can do nothing about it
            warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
            _show_own_warnings_without_place()
            yield
    finally:
        LIGHTNING_LOG.filters[:] = filters
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path


def _show_own_warnings_without_place() -> None:
    """Print warnings of this package as one line, without the place in our source; ``catch_warnings`` undoes it."""
    show_other = warnings.showwarning

    def show(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: str | None = None
    ) -> None:
        if Path(filename).is_relative_to(Path(__file__).parents[1]):
            print(f"lit-ppo: warning: {message}", file=file or sys.stderr, flush=True)
        else:
            show_other(message, category, filename, lineno, file, line)

    warnings.showwarning = show
