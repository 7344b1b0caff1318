"""Two agents of torchrun on one machine; one is lost with its worker, comes back, and the run goes on."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lit_ppo.cli.main import main
from tests.helpers.command import LIMIT, QUIET, REPOSITORY, run_command
from tests.helpers.event_files import close, metrics
from tests.helpers.ppo_command import ppo
from tests.helpers.ranks import open_store
from tests.helpers.tiny import make_causal_lm

pytestmark = pytest.mark.skipif(os.name == "nt", reason="process groups of POSIX")


def slow_reward(prompts: list[str], responses: list[str]) -> list[float]:
    """On the nodes, long enough to be hit in the middle of an update."""
    time.sleep(0.5 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0)
    return [float(len(response.split())) for response in responses]


def node(folder: Path, name: str, port: int, arguments: list[str]) -> None:
    """What torchrun does: an agent with one worker, which runs the command."""
    os.chdir(folder)
    output = open(f"{name}.txt", "a", buffering=1)  # noqa: SIM115  # as long as the process lives
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    sys.stdout = sys.stderr = output
    # torch 2.13: else a node that comes back waits for ever
    os.environ.update(QUIET | {"GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    torch.set_num_threads(1)
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=1,
        run_id="test",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_backend="c10d",
        rdzv_configs={"keep_alive_interval": 1, "keep_alive_max_attempt": 2, "is_host": "false"},
        max_restarts=3,
        monitor_interval=0.2,
        start_method="fork",
        local_addr="127.0.0.1",
    )
    elastic_launch(config, worker)(arguments)


def worker(arguments: list[str]) -> None:
    sys.exit(main(arguments))


def start(*args: Any) -> Any:
    """A node, in a process that has the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lit_ppo.cli.command", "tests.helpers.command", "tests.helpers.toys"])
    process = context.Process(target=node, args=args)
    process.start()
    return process


def lose(process: Any) -> None:
    """The node with all that runs on it, the worker included."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in (line.split() for line in found.splitlines())}
    lost = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in lost} - lost:
        lost |= more
    for pid in lost:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.join()


def test_an_agent_is_killed_and_comes_back(tmp_path: Path) -> None:
    actor = make_causal_lm(tmp_path / "lm", scale=4.0)
    arguments = [
        *ppo(tmp_path, actor),
        "--trainer.max_steps=5",
        "--checkpoint.every_n_train_steps=1",
        "--model.rewards.function=tests.parallel.test_elastic.slow_reward",
    ]
    for optimizer in ("--model.actor_optimizer", "--model.critic_optimizer"):
        arguments += [f"{optimizer}=torch.optim.SGD", f"{optimizer}.lr=0.05", f"{optimizer}.fused=false"]
        arguments.append(f"{optimizer}.momentum=0.5")  # a state, which is sharded as well
    run_command(*arguments, "--trainer.default_root_dir=whole", cwd=tmp_path).ok()
    nodes = [f"--config={REPOSITORY / 'configs/strategy/fsdp2_multinode.yaml'}", "--trainer.devices=1"]
    arguments += [*nodes, "--ckpt_path=auto", "--trainer.default_root_dir=cut"]
    store = open_store()  # the rendezvous
    saved, end = tmp_path / "cut/version_0/checkpoints", time.monotonic() + LIMIT
    agents = [start(tmp_path, name, store.port, arguments) for name in ("first", "second")]
    try:
        while not list(saved.glob("step-00000[2-4].ckpt")):
            assert time.monotonic() < end, _said(tmp_path)
            assert agents[0].is_alive(), _said(tmp_path)
            time.sleep(0.05)
        lose(agents[1])
        agents[1] = start(tmp_path, "second", store.port, arguments)
        for process in agents:
            process.join(max(end - time.monotonic(), 1.0))
            assert process.exitcode == 0, _said(tmp_path)
    finally:
        for process in agents:
            lose(process)
    assert "step-000005.ckpt" in {path.name for path in saved.iterdir()}
    assert "Restoring states from the checkpoint path" in _said(tmp_path)
    close(metrics(tmp_path / "whole/version_0"), metrics(tmp_path / "cut/version_0"))
    one, other = (
        torch.load(tmp_path / name / "version_0/checkpoints/step-000005.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def _said(folder: Path) -> str:
    return "\n".join((folder / f"{name}.txt").read_text() for name in ("first", "second"))
