"""The configurations of the supervised stages through the command, with only paths and sizes overridden."""

import csv
import gzip
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.helpers.command import QUIET, REPOSITORY, run_command

CONFIGS = REPOSITORY / "configs"
TEXTS = [f"The film {i} was {'really good and bright' if i % 2 else 'awful and dull'} ." for i in range(60)]
SHORT = ["--trainer.limit_train_batches=3", "--trainer.max_epochs=1", "--trainer.limit_val_batches=2"]


def rows(path: Path, content: list[dict[str, object]]) -> Path:
    """JSON lines, gzipped where the name says so."""
    lines = "".join(json.dumps(row) + "\n" for row in content).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def last_values(folder: Path) -> dict[str, float]:
    events = EventAccumulator(str(folder / "version_0")).Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def test_sft_on_ones_own_text(tmp_path: Path, tiny_llama: Path) -> None:
    rows(tmp_path / "train.jsonl", [{"text": text} for text in TEXTS])
    arguments = [f"--model.init_args.model={tiny_llama}", "--data.init_args.val_fraction=0.2", *SHORT]
    run_command("fit", "--config", CONFIGS / "sft.yaml", *arguments, cwd=tmp_path).ok()
    values = last_values(tmp_path / "runs/sft")
    assert math.isclose(values["val/perplexity"], math.exp(values["val/loss"]), rel_tol=1e-5)
    assert "train/loss" in values
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs/sft/version_0/model")


def test_two_ranks_validate_as_one(tmp_path: Path, tiny_llama: Path) -> None:
    """Rows of unequal length, an even number of them: a mean of the ranks' means would be another number."""
    for name in ("train", "val"):
        content = [{"text": " ".join(TEXTS[i : i + 1 + i % 2 * 4])} for i in range(10)]
        rows(tmp_path / f"{name}.jsonl", content)
    files = ["--data.init_args.val_path=val.jsonl", "--data.init_args.val_fraction=0"]
    arguments = ["--config", CONFIGS / "sft.yaml", f"--model.init_args.model={tiny_llama}", *files]
    arguments += ["--data.init_args.batch_size=1", "--data.init_args.max_length=64"]
    command = [sys.executable, "-m", "lit_ppo", "validate", *map(str, arguments), "--trainer.devices=2"]
    command += ["--trainer.accelerator=cpu", "--trainer.default_root_dir=two"]
    environment = os.environ | QUIET | {"PYTHONPATH": str(REPOSITORY)}
    with socket.socket() as taken:  # Lightning would choose this port for the ranks, although another run has it
        taken.bind(("", 0))
        taken.listen()
        environment["STANDALONE_PORT"] = str(taken.getsockname()[1])
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sync_dist" not in done.stderr  # Lightning's warning about values that differ between ranks
    run_command("validate", *arguments, "--trainer.default_root_dir=one", cwd=tmp_path).ok()
    one, two = (last_values(tmp_path / name) for name in ("one", "two"))
    for tag in ("val/loss", "val/perplexity"):
        assert math.isclose(one[tag], two[tag], rel_tol=1e-5), tag


def test_reward_on_ones_own_pairs(tmp_path: Path, tiny_llama: Path) -> None:
    pairs = [{"prompt": "the film was", "chosen": " good", "rejected": " bad"}] * 20
    rows(tmp_path / "pairs.jsonl", [{**pair, "prompt": f"the {i} film was"} for i, pair in enumerate(pairs)])
    arguments = [f"--model.init_args.model={tiny_llama}", "--data.init_args.val_fraction=0.3", *SHORT]
    run_command("fit", "--config", CONFIGS / "reward.yaml", *arguments, cwd=tmp_path).ok()
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(last_values(tmp_path / "runs/reward"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs/reward/version_0/model")
    assert loaded.config.num_labels == 1


def test_the_film_review_stages_in_their_order(tmp_path: Path) -> None:
    """Each starts from what the one before it has left."""
    data = tmp_path / "data"
    data.mkdir()
    rows(data / "imdb_unsup_part0.jsonl.gz", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    rows(data / "imdb_unsup_val.jsonl.gz", [{"id": i, "text": text} for i, text in enumerate(TEXTS[:20])])
    edges = [{"id": i, "label": i % 2, "head": text, "tail": text} for i, text in enumerate(TEXTS)]
    rows(data / "imdb_train_edges.jsonl.gz", edges)
    for part in ("train", "dev"):
        with (data / f"sst2_{part}.tsv").open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([text, i % 2] for i, text in enumerate(TEXTS))
    small = ["--model.init_args.model.hidden_size=16", "--data.init_args.tokenizer_vocab_size=300"]
    for stage in ("sft", "reward", "judge"):
        arguments = ["--data_root=data", *SHORT, *(small if stage == "sft" else [])]
        run_command("fit", "--config", CONFIGS / f"sentiment/{stage}.yaml", *arguments, cwd=tmp_path).ok()
    runs = tmp_path / "runs/sentiment"
    actor = AutoModelForCausalLM.from_pretrained(runs / "sft/model")
    tokenizer = AutoTokenizer.from_pretrained(runs / "sft/model")
    assert actor.config.vocab_size == len(tokenizer) == 300
    assert tokenizer(" the film was")["input_ids"] == tokenizer("the film was")["input_ids"]
    for stage in ("reward", "judge"):
        AutoModelForSequenceClassification.from_pretrained(runs / stage / "model")
        assert "val/accuracy" in last_values(runs / stage)
    assert AutoTokenizer.from_pretrained(runs / "reward/model").get_vocab() == tokenizer.get_vocab()
