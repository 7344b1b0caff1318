"""The configurations of the supervised stages through the command, with only paths and sizes overridden."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.helpers.command import REPOSITORY, run_command

CONFIGS = REPOSITORY / "configs"
TEXTS = [f"The film {i} was {'really good and bright' if i % 2 else 'awful and dull'} ." for i in range(60)]
PAIRS = [{"prompt": f"the {i} film was", "chosen": " good", "rejected": " bad"} for i in range(20)]
SHORT = ["--trainer.limit_train_batches=3", "--trainer.max_epochs=1", "--trainer.limit_val_batches=2"]


def rows(path: Path, content: list[dict[str, object]]) -> Path:
    """JSON lines, gzipped where the name says so."""
    lines = "".join(json.dumps(row) + "\n" for row in content).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def last_values(folder: Path) -> dict[str, float]:
    events = EventAccumulator(str(folder / "version_0")).Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("stage", "file", "content", "model", "metric"),
    [
        ("sft", "train.jsonl", [{"text": text} for text in TEXTS], AutoModelForCausalLM, "val/perplexity"),
        ("reward", "pairs.jsonl", PAIRS, AutoModelForSequenceClassification, "val/accuracy"),
    ],
)
def test_a_stage_on_ones_own_rows(
    tmp_path: Path, tiny_llama: Path, stage: str, file: str, content: list[Any], model: Any, metric: str
) -> None:
    rows(tmp_path / file, content)
    arguments = [f"--model.init_args.model={tiny_llama}", "--data.init_args.val_fraction=0.3", *SHORT]
    run_command("fit", "--config", CONFIGS / f"{stage}.yaml", *arguments, cwd=tmp_path).ok()
    assert {"train/loss", "val/loss", metric} <= set(last_values(tmp_path / "runs" / stage))
    model.from_pretrained(tmp_path / "runs" / stage / "version_0/model")


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
    for stage in ("sft", "reward", "judge", "critic"):
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
    for stage in ("reward", "critic"):
        assert AutoTokenizer.from_pretrained(runs / stage / "model").get_vocab() == tokenizer.get_vocab()
    assert {"train/loss", "train/explained_variance", "val/explained_variance"} <= set(last_values(runs / "critic"))
    AutoModelForSequenceClassification.from_pretrained(runs / "critic/model")
