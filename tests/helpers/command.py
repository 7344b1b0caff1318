"""The ``lit-ppo`` command for tests: through its own entry point, forked from a process that has the imports."""

import importlib.util
import io
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
LIMIT = 600.0  # seconds after which a run counts as hung: no test depends on the speed of the machine
PRELOAD = [  # by the process that is forked, with what almost every run imports later
    "lit_ppo.cli.command",
    "tests.helpers.command",
    "torch.utils.tensorboard",
    "transformers.generation.utils",
    "transformers.models.gpt2.modeling_gpt2",
]
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@dataclass
class Result:
    """How the command ended."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """Last line of standard error."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""

    def ok(self) -> "Result":
        """Itself; fails the test with all that was printed unless the command succeeded."""
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, *words: str) -> "Result":
        """Itself; checks for an error that is one line, the last, without a traceback, naming ``words``."""
        assert self.code not in (0, 130), f"exit code {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err + self.out
        assert self.last.startswith("lit-ppo: error: ")
        missing = [word for word in words if word not in self.last]
        assert not missing, f"{missing} not in: {self.last}"
        return self


class Running:
    """``lit-ppo`` at work in a fresh process that did not have to import anything."""

    def __init__(self, *args: Any, cwd: Path, env: Mapping[str, str] | None = None, calls: int = 1) -> None:
        cwd.mkdir(parents=True, exist_ok=True)
        self.cwd, self.args = cwd, [str(arg) for arg in args]
        for name in (".stdout", ".stderr"):
            (cwd / name).write_text("")
        context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
        if os.name != "nt":
            context.set_forkserver_preload(PRELOAD)
        self.process = context.Process(target=_child, args=(self.args, str(cwd), {**QUIET, **(env or {})}, calls))
        self.process.start()

    def result(self) -> Result:
        """How it ended; fails the test if it does not end."""
        self.process.join(LIMIT)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise AssertionError(f"lit-ppo {self.args} still ran after {LIMIT} s\n{self.out}\n{self.err}")
        return Result(code, self.out, self.err)

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return (self.cwd / ".stdout").read_text()

    @property
    def err(self) -> str:
        """What it has printed so far to standard error."""
        return (self.cwd / ".stderr").read_text()

    def wait_for(self, sign: str | Callable[[], Any]) -> None:
        """Until it has printed the words, or the condition holds."""
        end = time.monotonic() + LIMIT
        while not (sign in self.out if isinstance(sign, str) else sign()):
            assert self.process.is_alive(), self.out + self.err
            assert time.monotonic() < end, self.out + self.err
            time.sleep(0.05)

    def stop(self, number: int) -> Result:
        """Send a signal; how it ended."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        return self.result()


def run_command(*args: Any, cwd: Path, env: Mapping[str, str] | None = None, calls: int = 1) -> Result:
    """Run ``lit-ppo`` with these arguments and wait for its end.

    Args:
        *args: Arguments of the command.
        cwd: Working directory, made if need be.
        env: Further environment variables.
        calls: Number of times that ``main`` is called in that one process.
    """
    return Running(*args, cwd=cwd, env=env, calls=calls).result()


def processes(marker: str) -> list[str]:
    """Command lines of processes that mention the marker."""
    found = subprocess.run(["ps", "-eww", "-o", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if marker in line and " ps " not in line]


def _child(args: list[str], cwd: str, env: dict[str, str], calls: int) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(Path(cwd) / f".{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        setattr(sys, name, io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), line_buffering=True))
    os.chdir(cwd)
    os.environ.update(env)
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # for the stages
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))
    warnings.resetwarnings()
    warnings.simplefilter("ignore", ResourceWarning)  # as in a process that Python starts itself
    sys.argv = ["lit-ppo", *args]
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("lit_ppo.__main__")  # what launchers start again
    import torch

    from lit_ppo.cli.main import main

    torch.set_num_threads(1)
    code = 1
    for _ in range(calls):
        code = main(args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
