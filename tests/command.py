"""The ``lit-ppo`` command for tests: through its own entry point, forked from a process that has the imports."""

import io
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
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


def run_command(
    *args: Any, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 120.0, calls: int = 1
) -> Result:
    """Run ``lit-ppo`` with these arguments in a fresh process that does not have to import anything.

    Args:
        *args: Arguments of the command.
        cwd: Working directory, made if need be.
        env: Further environment variables.
        timeout: Seconds after which the test fails.
        calls: Number of times that ``main`` is called in that one process.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    out, err = cwd / ".stdout", cwd / ".stderr"
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    if os.name != "nt":
        context.set_forkserver_preload(["lit_ppo.command", "tests.command"])
    process = context.Process(
        target=_child, args=([str(arg) for arg in args], str(cwd), {**QUIET, **(env or {})}, str(out), str(err), calls)
    )
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"lit-ppo {args} still ran after {timeout} s\n{out.read_text()}\n{err.read_text()}")
    return Result(process.exitcode, out.read_text(), err.read_text())


def _child(args: list[str], cwd: str, env: dict[str, str], out: str, err: str, calls: int) -> None:
    for path, number, name in ((out, 1, "stdout"), (err, 2, "stderr")):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        setattr(sys, name, io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), line_buffering=True))
    os.chdir(cwd)
    os.environ.update(env)
    os.environ["PYTHONPATH"] = str(REPOSITORY)  # for the stages
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))
    warnings.resetwarnings()
    import torch

    from lit_ppo.cli import main

    torch.set_num_threads(1)
    code = 1
    for _ in range(calls):
        code = main(args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start_command(*args: Any, cwd: Path, env: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
    """``python -m lit_ppo`` as a process of its own, to be interrupted; output goes to ``out.txt``, ``err.txt``."""
    cwd.mkdir(parents=True, exist_ok=True)
    environment = os.environ | QUIET | {"PYTHONPATH": str(REPOSITORY)} | dict(env or {})
    with (cwd / "out.txt").open("w") as out, (cwd / "err.txt").open("w") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "lit_ppo", *map(str, args)],
            cwd=cwd,
            env=environment,
            stdout=out,
            stderr=err,
            text=True,
        )
