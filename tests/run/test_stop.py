"""SIGTERM, SLURM's requeue signal and a time limit: the current update ends, is saved, and the run ends."""

import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ppo.callbacks.base import PPOCallback
from lit_ppo.run import stop
from lit_ppo.run.checkpoint import StepCheckpoint, find_checkpoints
from tests.helpers.cli_toys import CONFIG
from tests.helpers.command import REPOSITORY, Running, run_command
from tests.helpers.event_files import scalars
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import logged, make_data, make_module, make_trainer

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal_lm(tmp_path_factory.mktemp("lm"), scale=4.0)


class Send(PPOCallback):
    """Sends this process a signal in the middle of an update."""

    def __init__(self, number: int, update: int) -> None:
        self.number, self.update = number, update

    def on_advantages(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        if pl_module.rollouts == self.update:
            os.kill(os.getpid(), self.number)


def fit(folder: Path, actor: Path, *callbacks: Any, ckpt_path: Path | None = None, **trainer: Any) -> Any:
    module = make_module(actor)
    saving = StepCheckpoint(every_n_train_steps=50, dirpath=str(folder / "saved"))
    made = make_trainer(
        folder,
        callbacks=[*callbacks, saving],
        enable_checkpointing=True,
        **{"max_steps": -1, "max_epochs": 2, **trainer},
    )
    made.fit(module, make_data(folder), ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return module, made


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, actor: Path) -> dict[str, torch.Tensor]:
    """The weights at the end of a run that nothing stops."""
    return dict(fit(tmp_path_factory.mktemp("uninterrupted"), actor)[0].state_dict())


def resumes_to(weights: dict[str, torch.Tensor], folder: Path, actor: Path, step: int) -> None:
    """Resume the run that was interrupted after ``step`` updates."""
    (newest,) = find_checkpoints(folder / "saved")
    assert newest.name == f"step-{step:06d}.ckpt"
    module, made = fit(folder, actor, ckpt_path=newest)
    assert len(logged(made)) == 4 - step
    for name, value in weights.items():
        assert module.state_dict()[name].equal(value), name


@pytest.mark.parametrize("update", [1, 2])  # inside the first epoch, and at its end
def test_sigterm_saves_the_update_that_it_came_in(tmp_path: Path, actor: Path, uninterrupted: Any, update: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, actor, Send(signal.SIGTERM, update))
    assert signal.getsignal(signal.SIGTERM) is before
    resumes_to(uninterrupted, tmp_path, actor, update)


def test_slurm_requeues_after_the_update(
    tmp_path: Path, actor: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``scontrol`` gets the job, and the checkpoint is of a complete update."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/scontrol.txt\n')
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    job = {"JOB_ID": "17", "JOB_NAME": "ppo", "NTASKS": "1", "NNODES": "1"}
    job |= dict.fromkeys(["PROCID", "LOCALID", "NODEID"], "0")
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, actor, Send(signal.SIGUSR1, 1), plugins=[SLURMEnvironment()])
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 17\n"
    hpc = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert hpc["lit_ppo"]["rollouts"] == hpc["global_step"] == 1
    for name in job:
        monkeypatch.delenv(f"SLURM_{name}")
    resumes_to(uninterrupted, tmp_path, actor, 1)


class TakesLong(PPOCallback):
    def on_update_end(self, *_: Any) -> None:
        time.sleep(0.6)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the timer is gone
def test_a_run_resumes_exactly_after_a_time_limit(tmp_path: Path, actor: Path, uninterrupted: Any) -> None:
    """The limit is reached in update 0, which is in the middle of an epoch."""
    fit(tmp_path, actor, TakesLong(), max_time={"milliseconds": 500})
    resumes_to(uninterrupted, tmp_path, actor, 1)


def test_a_second_signal_ends_the_run_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    request, before = stop.StopRequest(), signal.getsignal(signal.SIGTERM)
    trainer = SimpleNamespace(_accelerator_connector=SimpleNamespace(cluster_environment=None))
    request.listen(trainer)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.received == signal.SIGTERM
        assert "SIGTERM: saving after this step; a second signal ends the run at once" in capsys.readouterr().err
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGTERM)
        assert left.value.code == 143
        request.close()
        request.listen(trainer)
        assert request.received == 0  # the next run has not been asked
    finally:
        request.close()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("environment", "handled"),
    [
        (SLURMEnvironment(), {signal.SIGTERM, signal.SIGUSR1}),
        (SLURMEnvironment(requeue_signal=signal.SIGUSR2), {signal.SIGTERM, signal.SIGUSR2}),
        (SLURMEnvironment(auto_requeue=False), {signal.SIGTERM}),
        (None, {signal.SIGTERM}),
    ],
)
def test_the_signals_that_are_handled(environment: Any, handled: set[signal.Signals]) -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    request = stop.StopRequest()
    connector = SimpleNamespace(cluster_environment=environment)
    request.listen(SimpleNamespace(_accelerator_connector=connector))
    try:
        assert {number for number in numbers if signal.getsignal(number) is not before[number]} == handled
    finally:
        request.close()
    assert {number: signal.getsignal(number) for number in numbers} == before


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK", "SLURM_PROCID"])
def test_is_first_process(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("LOCAL_RANK", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(other, raising=False)
    assert stop.is_first_process()
    monkeypatch.setenv(name, "0")
    assert stop.is_first_process()
    monkeypatch.setenv(name, "1")
    assert not stop.is_first_process()


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    """With the code of the first, its last words, and nothing else."""
    script = (
        "import signal, time\n"
        "from lit_ppo.run.stop import Interrupts\n"
        "with Interrupts(lambda: print('last words')):\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        time.sleep(0.5)\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "        print('still there')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "last words\n", "")


@pytest.mark.parametrize("saves_first", [True, False])
def test_a_run_that_saves_has_as_long_as_its_step_takes(monkeypatch: pytest.MonkeyPatch, saves_first: bool) -> None:
    forced: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(stop, "GRACE", 0.1)
    monkeypatch.setattr(stop.Interrupts, "_exit_now", lambda self: forced.put(self.exit_code))
    with stop.Interrupts(lambda: None) as interrupts:
        interrupts.will_stop = lambda: saves_first
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.raise_signal(signal.SIGTERM)
        if saves_first:
            with pytest.raises(queue.Empty):
                forced.get(timeout=0.5)
            signal.raise_signal(signal.SIGTERM)
        assert forced.get(timeout=60) == 143


def test_the_command_loses_no_step_to_sigterm(tmp_path: Path) -> None:
    """Nothing would have been saved for 50 steps."""
    config = {**CONFIG, "checkpoint": {"every_n_train_steps": 50}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    words = ["fit", "--config", "toy.yaml", "--trainer.max_epochs=2", "--ckpt_path=auto"]  # there is none yet
    words.append("--trainer.callbacks=tests.helpers.cli_toys.Shout")
    command = Running(*words, "--model.sleep=2.0", cwd=tmp_path)
    command.wait_for("the heartbeat shows the progress line")  # printed at the start of the first step
    result = command.stop(signal.SIGTERM)
    assert result.code == 143
    assert "continue with: lit-ppo fit" in result.last
    assert result.last.endswith("--ckpt_path last")
    (saved,) = tmp_path.rglob("*.ckpt")
    run_command(*words, cwd=tmp_path).ok()
    assert sorted(scalars(tmp_path / "runs/version_0")) == list(range(16))
    assert not (tmp_path / "runs/version_1").exists()
    assert not saved.exists() or saved.name != "step-000016.ckpt"
