"""Sums by a tiny model, from problems to the table; what TRL's trainer is handed, without TRL."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.learning import trl
from benchmarks.learning.arithmetic import report, task
from benchmarks.learning.arithmetic.__main__ import best_rate, main, parse, stored
from benchmarks.learning.trl_batches import Batches, MeanOverResponse
from lit_ppo import PromptDataModule, RewardModel
from tests.helpers.tiny import WORDS, make_causal_lm, make_reward_model, make_tokenizer, write_rows
from tests.helpers.toys import make_module, make_trainer


def test_problems_are_solved_but_for_a_wrong_digit_and_held_out_ones_are_nowhere_else(tmp_path: Path):
    task.write_problems(tmp_path, 2000, 500, 50, wrong=0.5)
    solved = [json.loads(line) for line in (tmp_path / task.SFT).read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / task.PROMPTS).read_text().splitlines()]
    held_out = task.held_out_problems(tmp_path)
    assert (len(solved), len(prompts), len(set(held_out))) == (2000, 500, 50)
    assert not {*held_out} & {*prompts, *(row["prompt"] for row in solved)}
    different = []
    for row in solved:
        a, b = row["prompt"].removesuffix("=").split("+")
        wanted = str(int(a) + int(b))
        different.append(sum(x != y for x, y in zip(wanted, row["completion"], strict=True)))
    assert {*different} == {0, 1}
    assert sum(different) / len(different) == pytest.approx(0.5, abs=0.05)


def test_tokens_are_letters_and_text_comes_back(tmp_path: Path):
    task.make_tokenizer(tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("95+17=").input_ids
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "95+17="


@pytest.mark.filterwarnings("default")  # the command runs in this process
def test_sums_from_problems_to_the_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One method, two rates; the better one gets the second seed, and nothing runs twice."""
    folder, results = tmp_path / "folder", tmp_path / "results"
    sizes = {"solved": 128, "problems": 600, "held_out": 4, "samples": 2, "updates": 2}
    words = [str(folder), "--results", str(results), *(f"--{name}={value}" for name, value in sizes.items())]
    words += [
        "--methods",
        "rloo",
        "reinforce_pp",
        "--rates",
        "1e-4",
        "1e-3",
        "--seeds",
        "3",
        "5",
        "--measure",
        "1",
        "2",
    ]
    main(words)
    asked = parse(words)
    best = best_rate(asked, "rloo")
    for rate in (1e-4, 1e-3):
        runs = stored(asked, "rloo", rate)["runs"]
        assert [run["seed"] for run in runs] == ([3, 5] if rate == best else [3])
        assert [point["episodes"] for point in runs[0]["points"]] == [256, 512]
    before = {file: file.read_bytes() for file in results.iterdir()}
    main(words)
    assert {file: file.read_bytes() for file in results.iterdir()} == before
    report.main([str(results), "--figure", str(tmp_path / "figure.png")])
    table = capsys.readouterr().out.splitlines()
    assert sum(row.startswith("| **rloo** | ") for row in table) == 2
    assert sum(row.startswith("| rloo | ") for row in table) == 1
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_mean_over_the_response_is_what_our_reward_model_says(tmp_path: Path):
    """A padded batch, read at its last token, as TRL reads it."""
    make_reward_model(tmp_path, "llama")
    tokenizer = make_tokenizer()
    prompts, responses = ["the film was", "a"], [" good and not dull", " bad story it was"]
    ids = [tokenizer(p + r).input_ids for p, r in zip(prompts, responses, strict=True)]
    width = max(map(len, ids))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    model.score = MeanOverResponse(model.score)
    model.score.start = 3
    states = model.model(input_ids=padded, attention_mask=mask, position_ids=mask.cumsum(1) - mask)[0]
    found = model.score(states)[:, -1, 0].detach()
    experience = SimpleNamespace(prompts=prompts, responses=responses, columns={}, ended=[False, False])
    wanted = RewardModel(str(tmp_path), aggregation="mean")(experience)
    torch.testing.assert_close(found, torch.as_tensor(wanted), atol=1e-5, rtol=1e-4)


def test_batches_say_where_responses_start():
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    head = MeanOverResponse(torch.nn.Linear(2, 1))
    starts = []
    for batch in Batches([[[3, 4], [5]], [[6, 7, 8]]], tokenizer, head):
        starts.append(head.start)
        assert batch["input_ids"].shape[1] == head.start
    assert starts == [2, 3]


class Seen(L.Callback):
    """Keeps the tokens of the prompts of each update."""

    def __init__(self) -> None:
        self.ids: list[list[list[int]]] = []

    def on_rollout_end(self, trainer: L.Trainer, pl_module: Any, experience: Any) -> None:
        self.ids.append([pl_module.tokenizer(prompt).input_ids for prompt in experience.prompts])


def test_prompts_are_those_of_our_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    actor, seen = make_causal_lm(tmp_path / "lm"), Seen()
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{a} {b}"} for a in WORDS[:6] for b in WORDS[6:16]])
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")  # what seed_everything leaves
    make_trainer(tmp_path, callbacks=[seen]).fit(
        make_module(actor), PromptDataModule(file, val_fraction=0.02, batch_size=10)
    )
    assert trl.prompts_of(Path(file), str(actor), 2, seed=5, batch=10) == seen.ids
    assert trl.prompts_of(Path(file), str(actor), 2, seed=6, batch=10) != seen.ids


def test_a_saved_actor_is_measured_by_both_readings(tmp_path: Path):
    """The SFT model itself: no KL; the score of the reading that was asked for comes first."""
    models = tmp_path / "runs" / "sentiment"
    make_causal_lm(models / "sft" / "model")
    for stage, seed in (("reward", 1), ("judge", 2)):
        make_reward_model(models / stage / "model", seed=seed)
    with gzip.open(tmp_path / "imdb_prompts_eval.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps({"prompt": word}) + "\n" for word in WORDS[:3])
    words: list[Any] = [str(tmp_path), "--data_root", str(tmp_path), "--python", "python", "--name", "x"]
    asked = trl.parse([*words, "--samples", "2", "--prompts", "3", "--max_new_tokens", "4"])
    point = trl.measured(tmp_path, tmp_path, models / "sft" / "model", asked)
    assert point["kl"] == 0.0
    assert point["score"] == point["score_mean"] != point["score_last"]


def test_arguments_of_our_run_need_one(capsys: pytest.CaptureFixture[str]):
    words = ["folder", "--data_root", "data", "--python", "python", "--name", "x", "--config", "sentiment"]
    assert trl.parse([*words, "--ours", "y"]).arguments == ["--config", "sentiment"]
    with pytest.raises(SystemExit):
        trl.parse(words)
    assert "unrecognized arguments: --config sentiment" in capsys.readouterr().err
