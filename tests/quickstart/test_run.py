"""The quickstart's configurations through the command, with small numbers: what they chain, and the judge of a run."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from benchmarks.quickstart_check import Judged, exact_kl, judge
from lit_ppo.quickstart import Report
from tests.helpers.command import REPOSITORY, Result, run_command
from tests.helpers.tiny import make_causal_lm

CONFIGS = REPOSITORY / "configs"
SMALL = {
    "sft": {
        "data.init_args.n_reviews": 400, "data.init_args.n_labelled": 84, "data.init_args.n_prompts": 16,
        "data.init_args.n_eval_prompts": 8, "data.init_args.tokenizer_vocab_size": 400,
        "model.init_args.model.n_embd": 16, "trainer.max_steps": 30,
    },
    "reward": {"trainer.max_steps": 22},
}  # fmt: skip


def quickstart(folder: Path, *arguments: str) -> Result:
    """``lit-ppo fit --config configs/quickstart.yaml`` with small stages."""
    stages = [
        {
            "name": stage["name"],
            "config": [str(CONFIGS / path) for path in stage["config"]],
            "args": [word for key, value in SMALL[stage["name"]].items() for word in (f"--{key}", value)],
        }
        for stage in yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())["stages"]
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text(yaml.safe_dump({"stages": stages}))
    files = ["--config", CONFIGS / "quickstart.yaml", "--config", "small.yaml"]
    sizes = ["--data.init_args.batch_size=8", "--model.init_args.minibatch_size=4", "--trainer.max_steps=2"]
    sizes.append("--trainer.val_check_interval=0.5")
    return run_command("fit", *files, *sizes, *arguments, cwd=folder).ok()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Result]]:
    """The job in an empty folder, twice."""
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, [quickstart(folder), quickstart(folder)]


def test_three_runs_from_an_empty_folder(run: tuple[Path, list[Result]]) -> None:
    folder, (first, _) = run
    order = [first.out.index(words) for words in ("stage 1/2: sft", "stage 2/2: reward", "prompts before and after")]
    assert order == sorted(order)
    for part in ("sft/model", "reward/model", "ppo/version_0/model"):
        assert (folder / "runs/quickstart" / part / "model.safetensors").is_file()
    assert {path.name for path in folder.iterdir()} == {"runs", "small.yaml", ".stdout", ".stderr"}
    assert {path.name for path in (folder / "runs/quickstart").iterdir()} == {
        "data", "tokenizer", "sft", "reward", "ppo",
    }  # fmt: skip


def test_second_time_the_stages_are_skipped_and_the_numbers_the_same(run: tuple[Path, list[Result]]) -> None:
    folder, (first, second) = run
    assert second.out.count("already done, skipped") == 2
    scores = [re.findall(r"mean score .*|mean kl .*", result.out) for result in (first, second)]
    assert len(scores[0]) == 2
    assert scores[0] == scores[1]
    assert (folder / "runs/quickstart/ppo/version_1/model").is_dir()


def test_lost_data_makes_its_stage_run_again(run: tuple[Path, list[Result]]) -> None:
    """The record of the stage that writes the files holds all of them; tests/cli/test_stages.py has the rest."""
    record = json.loads((run[0] / "runs/quickstart/sft/sft.stage.json").read_text())
    for name in ("reviews", "labelled", "prompts", "prompts_eval"):
        assert record[f"runs/quickstart/data/{name}.jsonl"], name


def test_a_run_can_be_judged(run: tuple[Path, list[Result]]) -> None:
    folder, _ = run
    data = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())["data"]["init_args"]
    assert data["val_path"] == "prompts_eval.jsonl"  # what the judge reads
    judged = judge(folder / "runs/quickstart", number=8)
    assert judged.before.number == judged.after.number == 8
    assert judged.failures()  # nothing is learnt in a few steps
    assert 0 <= judged.kl < 1


def test_kl_of_the_judge(tmp_path: Path) -> None:
    """Against each response alone, unpadded, position by position."""
    paths = [make_causal_lm(tmp_path / str(seed), seed=seed, scale=20.0) for seed in (0, 1)]
    model, reference = (AutoModelForCausalLM.from_pretrained(path).eval().double() for path in paths)
    eos = 1
    ids = torch.tensor([[0, 0, 7, 5, 9, eos, 0, 0], [4, 6, 8, 3, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    total = 0.0
    for row, start, length in ((ids[0, 2:6], 1, 3), (ids[1], 3, 5)):
        with torch.no_grad():
            p, q = (m(row[None]).logits[0, start - 1 : start + length - 1].softmax(-1) for m in (model, reference))
        total += float((p * (p / q).log()).sum())
    assert exact_kl(model, reference, ids, mask, eos) == pytest.approx(total / 2, rel=1e-6)


def test_judge_names_each_broken_promise() -> None:
    good = Report(256, parsed=0.95, positive=0.3, distinct_bigrams=900, largest_pattern=0.1, patterns={})
    better = Report(256, parsed=0.95, positive=0.9, distinct_bigrams=700, largest_pattern=0.2, patterns={})
    collapsed = Report(256, parsed=0.8, positive=0.8, distinct_bigrams=600, largest_pattern=0.6, patterns={})
    assert Judged(good, better, 2.0, []).failures() == []
    assert len(Judged(good, collapsed, 5.0, []).failures()) == 5
