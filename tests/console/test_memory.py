"""``lit-ppo memory`` as a user sees it, and the job that it reads from a configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ppo.memory.job import Job, MicroBatch, job_of
from tests.helpers.command import run_command
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import make_module


def configuration(trainer: dict[str, Any], **data: Any) -> dict[str, Any]:
    """A full configuration of PPO."""
    model = {"init_args": {"generation": {"max_new_tokens": 100}, "minibatch_size": 16}}
    return {"model": model, "data": {"init_args": data}, "trainer": trainer}


def test_the_job_is_that_of_the_configuration() -> None:
    fsdp2 = {"class_path": "lit_ppo.FSDP2Strategy", "init_args": {"mixed_precision": "bfloat16"}}
    trainer = {"accelerator": "cpu", "devices": 8, "num_nodes": 2, "strategy": fsdp2, "precision": "32-true"}
    job, notes = job_of(configuration(trainer, batch_size=64, max_prompt_length=256))
    expected = Job(
        batch_size=64, prompt_tokens=256, n_processes=16, strategy="fsdp2", gathered=torch.bfloat16, on_gpu=False
    )
    assert (job, notes) == (expected, [])


def test_what_a_configuration_leaves_open_is_said() -> None:
    trainer = {"accelerator": "cpu", "devices": "auto", "precision": "bf16-mixed"}
    job, notes = job_of(configuration(trainer), most_positions=128)
    assert job == Job(batch_size=16, prompt_tokens=28, precision="bf16-mixed", n_processes=1)
    assert [note.split(":")[0] for note in notes] == [
        "trainer.devices is auto", "data.max_prompt_length is not set", "the data name no batch_size",
    ]  # fmt: skip


def test_tricks_that_need_less_or_more_are_seen() -> None:
    names = ("lit_ppo.callbacks.LeastSquaresCritic", "CounterfactualActions")
    trainer = {"accelerator": "cpu", "devices": 1, "callbacks": [{"class_path": name} for name in names]}
    job, notes = job_of(configuration(trainer, batch_size=8, max_prompt_length=8))
    assert job.critic_frozen
    assert notes == ["the other tokens of CounterfactualActions are not counted"]
    assert job_of(configuration({**trainer, "callbacks": {"class_path": names[0]}}, batch_size=8))[0].critic_frozen


@pytest.mark.parametrize(("given", "replay"), [({}, 3), ({"replay": 1}, 1), ({"replay": 0}, 0)])
def test_earlier_responses_are_rows_of_a_micro_batch(given: dict[str, Any], replay: int, tmp_path: Path) -> None:
    """Minibatches of 8: with three earlier responses for each new one, 32 rows in micro-batches of up to 64."""
    callbacks = [{"class_path": "AdvantageRegression", "init_args": given}]
    trainer = {"accelerator": "cpu", "devices": 1, "callbacks": callbacks}
    job, notes = job_of(configuration(trainer, batch_size=16, max_prompt_length=8))
    module = make_module(make_causal_lm(tmp_path), minibatch_size=8, micro_batch_size=64)
    assert MicroBatch.of(module, job).rows == 8 * (1 + replay)
    said = "the earlier responses of AdvantageRegression, in host memory, are not counted"
    assert (said in notes) == (replay > 0)


def test_the_quickstart_is_counted_before_its_stages_have_run(tmp_path: Path) -> None:
    """2 layers of 128 x (12 x 128 + 13), final norm, 1280 + 64 embeddings of 128."""
    done = run_command("memory", "--config", "quickstart", cwd=tmp_path)
    assert done.code == 0, done.err
    weights = 2 * 128 * (12 * 128 + 13) + 2 * 128 + (1280 + 64) * 128
    assert f"{weights:,} in float32" in done.out
    assert f"{weights + 128 + 1:,} in float32" in done.out  # the critic has a value head
    assert "Largest phase: " in done.out
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == []


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    done = run_command("memory", "--config", "ppo", "--model.init_args.actor", "./nothing", cwd=tmp_path)
    assert done.code == 1
    assert "LitPPO(actor='./nothing'): its config.json cannot be read" in done.last
    done = run_command("memory", "--config", "sft", cwd=tmp_path)
    assert done.code == 2
    assert "only jobs of LitPPO are counted" in done.last
