"""Two agents of torchrun on one machine; one is lost with its worker, comes back, and the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.command import LIMIT, QUIET, REPOSITORY, run_command
from tests.helpers.event_files import close, metrics
from tests.helpers.ppo_command import ppo
from tests.helpers.ranks import open_store
from tests.helpers.tiny import make_causal_lm

pytestmark = pytest.mark.skipif(os.name == "nt", reason="process groups of POSIX")


def slow_reward(prompts: list[str], responses: list[str]) -> list[float]:
    """Long enough to be hit in the middle of an update."""
    time.sleep(0.5)
    return [float(len(response.split())) for response in responses]


def agent(folder: Path, name: str, port: int, arguments: list[str]) -> "subprocess.Popen[bytes]":
    """torchrun with one worker, in a group of its own: a node."""
    rendezvous = [f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_backend=c10d", "--rdzv_id=test", "--max_restarts=3"]
    rendezvous.append("--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=2,is_host=false")
    sizes = ["--nnodes=2", "--nproc_per_node=1", "--monitor_interval=0.2", "--local_addr=127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, *sizes, "-m", "lit_ppo", *arguments]
    environment = os.environ | QUIET | {"PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # torch 2.13: else a node that comes back waits for ever
    with (folder / f"{name}.txt").open("ab") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def lose(process: "subprocess.Popen[bytes]") -> None:
    """The node with all that runs on it, torchrun's workers included: each has a session of its own."""
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
    process.wait()


def test_an_agent_is_killed_and_comes_back(tmp_path: Path) -> None:
    actor = make_causal_lm(tmp_path / "lm", scale=4.0)
    arguments = [
        *ppo(tmp_path, actor),
        "--trainer.max_steps=6",
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
    agents = [agent(tmp_path, "first", store.port, arguments)]
    try:
        agents.append(agent(tmp_path, "second", store.port, arguments))
        while not list(saved.glob("step-00000[2-5].ckpt")):
            assert time.monotonic() < end, _said(tmp_path)
            assert agents[0].poll() is None, _said(tmp_path)
            time.sleep(0.05)
        lose(agents[1])
        agents[1] = agent(tmp_path, "second", store.port, arguments)
        for process in agents:
            assert process.wait(max(end - time.monotonic(), 1.0)) == 0, _said(tmp_path)
    finally:
        for process in agents:
            lose(process)
    assert "step-000006.ckpt" in {path.name for path in saved.iterdir()}
    assert (
        "Restoring states from the checkpoint path"
        in (tmp_path / "first.txt").read_text() + (tmp_path / "second.txt").read_text()
    )
    close(metrics(tmp_path / "whole/version_0"), metrics(tmp_path / "cut/version_0"))
    one, other = (
        torch.load(tmp_path / name / "version_0/checkpoints/step-000006.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def _said(folder: Path) -> str:
    return "\n".join((folder / f"{name}.txt").read_text()[-3000:] for name in ("first", "second"))
