"""``configs/ppo.yaml`` through the command: training, two processes, evaluation, the result."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.helpers.command import Running, processes, run_command
from tests.helpers.event_files import metrics
from tests.helpers.ppo_command import ppo, ppo_arguments


@pytest.fixture
def arguments(tmp_path: Path, tiny_lm: Path, tiny_reward: Path) -> list[str]:
    return ppo_arguments(tmp_path, tiny_lm, tiny_reward)


def test_twice_the_same_numbers_and_a_result_that_loads_and_is_evaluated(arguments: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        out = run_command("fit", *arguments, cwd=tmp_path).ok().out
    assert "prompts before and after" in out
    first, second = (metrics(tmp_path / f"runs/ppo/version_{i}") for i in range(2))
    assert first == second
    assert {"objective/score", "value/loss", "val/score"} <= first.keys()
    checkpoint = next((tmp_path / "runs/ppo/version_0").rglob("*.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["kl_coef"] == 0.05  # holds no pickled code
    model = tmp_path / "runs/ppo/version_0/model"
    loaded = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert loaded.config.vocab_size == len(tokenizer)
    assert GenerationConfig.from_pretrained(model).eos_token_id == tokenizer.eos_token_id
    held_out = ["--data.test_path=prompts.jsonl", "--data.predict_path=prompts.jsonl"]
    validated = run_command("validate", *arguments, "--ckpt_path=last", cwd=tmp_path).ok().out
    assert "val/score" in validated
    assert "val/kl" in validated
    assert "test/score" in run_command("test", *arguments, *held_out, cwd=tmp_path).ok().out
    run_command("predict", *arguments, *held_out, cwd=tmp_path).ok()
    (path,) = tmp_path.rglob("predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 16
    assert {"prompt", "response", "score"} <= set(rows[0])


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupt_ends_both_processes(arguments: list[str], tmp_path: Path) -> None:
    """No strategy is named; both write to one folder."""
    marker = f"--trainer.default_root_dir={tmp_path}/runs"
    endless = ["--trainer.devices=2", "--trainer.max_epochs=9999", "--checkpoint.every_n_train_steps=1"]
    command = Running("fit", *arguments, marker, *endless, cwd=tmp_path)
    command.wait_for(lambda: re.search(r"update [1-9]", command.out))
    assert processes(marker)
    result = command.stop(signal.SIGINT)
    assert result.code == 130
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]
    assert "--ckpt_path last" in result.last
    assert not processes(marker)


def test_a_failed_start_leaves_no_run_folder(tmp_path: Path, tiny_lm: Path) -> None:
    """A run that has made an update keeps its own, and so do files that the start has not written."""
    (tmp_path / "failing.py").write_text(
        "import pathlib\n\ncalls = []\n\n\ndef at_once(responses):\n    raise OSError('no')\n\n\n"
        "def with_notes(responses):\n    pathlib.Path('runs/ppo/version_0/notes').touch()\n    raise OSError\n\n\n"
        "def later(responses):\n    calls.append(1)\n    return [1.0 / (len(calls) < 3)] * len(responses)\n"
    )
    args = [*ppo(tmp_path, tiny_lm), "--trainer.max_steps=4"]
    for function, left in (("at_once", []), ("with_notes", ["version_0"]), ("later", ["version_0", "version_1"])):
        run_command(*args, f"--model.rewards.function=failing.{function}", cwd=tmp_path).refused(function)
        assert sorted(path.name for path in (tmp_path / "runs/ppo").iterdir()) == left
