"""Ctrl-C ends the command, whatever it waits for, with its exit code and words, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.cli_toys import CONFIG
from tests.helpers.command import LIMIT, REPOSITORY, Running, processes, run_command

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def start(tmp_path: Path, *args: str, **overrides: object) -> Running:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**CONFIG, **overrides}))
    return Running("fit", "--config", "toy.yaml", *args, cwd=tmp_path)


def test_in_training_with_a_checkpoint(tmp_path: Path) -> None:
    command = start(tmp_path, "--model.sleep=0.2", "--trainer.max_epochs=90", "--ckpt_path", "null")
    command.wait_for(lambda: list((tmp_path / "runs/version_0/checkpoints").glob("*.ckpt")))
    result = command.stop(signal.SIGINT)
    assert result.code == 130
    expected = "lit-ppo fit --config toy.yaml --model.sleep=0.2 --trainer.max_epochs=90 --ckpt_path last"
    assert result.last.endswith(f"continue with: {expected}")
    words = expected.replace("epochs=90", "epochs=1").split()[1:]
    run_command(*words, cwd=tmp_path).ok()


def test_in_a_new_run_from_the_configuration_of_another_one(tmp_path: Path) -> None:
    """With ``last`` that configuration resumes the other run."""
    start(tmp_path).result().ok()
    old = "runs/version_0/config.yaml"
    slow = ["--model.sleep=0.2", "--trainer.max_epochs=90"]
    command = Running("fit", "--config", old, *slow, cwd=tmp_path)
    command.wait_for(lambda: list((tmp_path / "runs/version_1/checkpoints").glob("*.ckpt")))
    expected = "continue with: lit-ppo fit --config runs/version_1/config.yaml --ckpt_path last"
    assert command.stop(signal.SIGINT).last.endswith(expected)


def test_before_there_is_a_checkpoint(tmp_path: Path) -> None:
    """An earlier run's checkpoint is not this one's."""
    start(tmp_path).result().ok()
    command = start(tmp_path, "--model.sleep=3600")
    command.wait_for("step 0/8")
    result = command.stop(signal.SIGINT)
    assert result.code == 130
    assert result.last.endswith("continue with: lit-ppo fit --config toy.yaml --model.sleep=3600")


def test_while_loading(config: Path, tmp_path: Path) -> None:
    """The real command, whose first words come before the imports."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "lit_ppo", "fit", "--config", str(config)]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("lit-ppo: loading")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert "continue with: lit-ppo fit" in err.strip().splitlines()[-1]


def test_in_a_stage(tmp_path: Path) -> None:
    marker = f"--trainer.default_root_dir={tmp_path}/first"
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(CONFIG))
    stage = {"name": "first", "config": ["plain.yaml"], "args": [marker, "--model.sleep=3600"]}
    command = start(tmp_path, stages=[stage])
    command.wait_for(lambda: command.out.count("lit-ppo: loading") == 2)  # the stage has its handlers
    assert processes(marker)
    result = command.stop(signal.SIGINT)
    assert result.code == 130
    assert result.last.endswith("continue with: lit-ppo fit --config toy.yaml")
    assert not processes(marker)
    assert not list(tmp_path.rglob("*.stage.json"))
