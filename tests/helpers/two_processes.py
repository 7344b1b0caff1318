"""A function on two ranks, in processes forked from one that has the imports, as if torchrun had started them."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_two(function: Callable[..., None], *args: Any, folder: Path, timeout: float = 90.0) -> list[str]:
    """Run ``function(*args)`` on both; their outputs. Fails the test unless both end in time and without error."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lit_ppo.cli.command", "tests.helpers.command", "tests.helpers.killed_runs"])
    processes = [context.Process(target=_child, args=(rank, port, str(folder), function, args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    outputs = [(folder / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert codes == [0, 0], f"{codes}\n{outputs[0][-3000:]}\n{outputs[1][-3000:]}"
    return outputs


def _child(rank: int, port: int, folder: str, function: Callable[..., None], args: Any) -> None:
    sink = os.open(Path(folder) / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    import torch

    torch.set_num_threads(1)
    function(*args)
    os._exit(0)  # a process group that has failed may never be torn down
