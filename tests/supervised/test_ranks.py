"""Metrics of the supervised modules are those of all rows, each once, on however many ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ppo import LitRewardModel, LitSFT, PreferenceDataModule, TextDataModule
from lit_ppo.supervised.critic import LitCritic
from tests.helpers.ranks import on_ranks
from tests.helpers.supervised import HOW_TESTS_USE_LIGHTNING, make_trainer
from tests.helpers.tiny import WORDS, make_causal_lm, make_reward_model, write_rows

pytestmark = HOW_TESTS_USE_LIGHTNING

FOUR, THREE = (2, 9, 4, 12), (12, 2, 9)  # words of the texts
KINDS = ("sft", "critic", "pairs", "labels")


def different_words(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(set(response.split()))) for response in responses]


def write(path: Path, lengths: tuple[int, ...]) -> None:
    """Texts of the lengths, each with a pair and a label."""
    rows: list[dict[str, Any]] = []
    for i, n in enumerate(lengths):
        text = " ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(n))
        rows.append({"text": text, "chosen": f"{text} {WORDS[i]}", "rejected": WORDS[i + 5], "label": i % 2})
    write_rows(path, rows)


def job(kind: str, folder: Path, n_val: int, batch_size: int) -> tuple[Any, Any]:
    """A module with its data."""
    settings: dict[str, Any] = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    files = {"path": str(folder / "train.jsonl"), "val_path": str(folder / f"{n_val}.jsonl")}
    options: dict[str, Any] = {**files, "batch_size": batch_size, "seed": 1}
    if kind == "sft":
        return LitSFT(str(folder / "lm"), **settings), TextDataModule(**options)
    if kind == "critic":  # a text of two words is too short to count
        return LitCritic(str(folder / "rm"), different_words, 3, **settings), TextDataModule(**options)
    columns = {"text_column": "text", "label_column": "label"} if kind == "labels" else {}
    return LitRewardModel(str(folder / "rm"), **settings), PreferenceDataModule(**options, **columns)


def measure(n: int, folder: Path, strategy: str) -> None:
    """The metrics of a step on four rows, and then of one and three validation rows."""
    found = {}
    for kind in KINDS:
        for n_val in (1, 3):
            module, data = job(kind, folder, n_val, 4 // n)
            trainer = make_trainer(folder, devices=n, strategy=strategy)
            trainer.fit(module, data)
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            metrics.pop("train/explained_variance", None)  # of the first rank's batch
            found[f"{kind}, {n_val}"] = metrics
    if trainer.is_global_zero:
        (folder / f"{strategy}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, rows and the metrics of one rank."""
    folder = tmp_path_factory.mktemp("ranks")
    make_causal_lm(folder / "lm", "llama", scale=10.0)
    make_reward_model(folder / "rm", "llama", initializer_range=0.3)
    for name, lengths in {"train": FOUR, "3": THREE, "1": THREE[:1]}.items():
        write(folder / f"{name}.jsonl", lengths)
    measure(1, folder, "auto")
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_metrics_of_two_ranks_are_those_of_one(on_one: Path, strategy: str) -> None:
    """An odd number of rows: the rank without a row of its own runs a forward that does not count."""
    on_ranks(2, measure, 2, on_one, strategy, folder=on_one / f"{strategy} ranks")
    one, two = (json.loads((on_one / f"{name}.json").read_text()) for name in ("auto", strategy))
    assert [*one] == [*two]
    for case, metrics in one.items():
        assert {"train/loss", "val/loss"} <= metrics.keys()
        assert two[case] == pytest.approx(metrics, rel=1e-4, abs=1e-5), case
