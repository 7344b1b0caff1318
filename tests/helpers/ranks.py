"""Several ranks for tests: processes forked from one that has the imports, as torchrun would start them."""

import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from tests.helpers.command import QUIET


def open_store() -> TCPStore:
    """A store for ranks to meet at; it listens on a port that the operating system chooses, as long as it is held."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def rank_environment(store: TCPStore, rank: int, n: int, nodes: int = 1) -> dict[str, str]:
    """The variables that torchrun sets for a rank; the ranks meet at the store."""
    local = n // nodes
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the store listens already, so rank 0 does not have to
        "TORCHELASTIC_RUN_ID": "tests",
        "RANK": rank,
        "LOCAL_RANK": rank % local,
        "GROUP_RANK": rank // local,
        "WORLD_SIZE": n,
        "LOCAL_WORLD_SIZE": local,
    }
    return {name: str(value) for name, value in variables.items()}


def on_ranks(
    n: int, function: Callable[..., None], *args: Any, folder: Path, timeout: float = 240.0, connect: bool = True
) -> None:
    """Run a function of some module on ``n`` ranks; fails the test with what a failing rank says.

    Args:
        n: Number of ranks.
        function: Is called on each.
        *args: Of the function.
        folder: For what the ranks print.
        timeout: Seconds after which all are killed.
        connect: Make the process group; else the function does.
    """
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    if os.name != "nt":
        context.set_forkserver_preload(
            ["lit_ppo.cli.command", "tests.helpers.command", "tests.helpers.ranks", "tests.helpers.toys"]
        )
    store = open_store()
    folder.mkdir(parents=True, exist_ok=True)
    environments = [rank_environment(store, rank, n) for rank in range(n)]
    processes = [
        context.Process(target=_child, args=(rank, environment, connect, folder, function, args))
        for rank, environment in enumerate(environments)
    ]
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


def _child(
    rank: int, environment: dict[str, str], connect: bool, folder: Path, function: Callable[..., None], args: Any
) -> None:
    output = open(folder / f".rank{rank}", "w", buffering=1)  # noqa: SIM115  # as long as the process lives
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    sys.stdout = sys.stderr = output
    os.environ.update(QUIET | environment)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        if connect:
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
        function(*args)
        if connect:
            torch.distributed.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    output.flush()
    os._exit(code)
