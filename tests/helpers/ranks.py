"""Several ranks for tests: processes forked from one that has the imports, as torchrun would start them."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tests.helpers.command import QUIET


def on_ranks(n: int, function: Callable[..., None], *args: Any, folder: Path, timeout: float = 240.0) -> None:
    """Run a function of some module on ``n`` ranks; fails the test with what a failing rank says.

    Args:
        n: Number of ranks.
        function: Is called on each.
        *args: Of the function.
        folder: For what the ranks print.
        timeout: Seconds after which all are killed.
    """
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    if os.name != "nt":
        context.set_forkserver_preload(
            ["lit_ppo.cli.command", "tests.helpers.command", "tests.helpers.ranks", "tests.helpers.toys"]
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    processes = [context.Process(target=_child, args=(rank, n, port, folder, function, args)) for rank in range(n)]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    try:
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        for process in processes:
            process.join(0 if time.monotonic() > end else 5)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    told = "\n".join(f"rank {rank}:\n{(folder / f'.rank{rank}').read_text()[-4000:]}" for rank in range(n))
    assert codes == [0] * n, f"exit codes {codes}\n{told}"


def _child(rank: int, n: int, port: int, folder: Path, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    output = open(folder / f".rank{rank}", "w", buffering=1)  # noqa: SIM115  # as long as the process lives
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    sys.stdout = sys.stderr = output
    os.environ.update(QUIET | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"})
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(n)})
    os.environ.update({"WORLD_SIZE": str(n), "TORCHELASTIC_USE_AGENT_STORE": "False"})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
        function(*args)
        torch.distributed.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    output.flush()
    os._exit(code)
