"""Text for next-token training: pieces, packing, padding, labels, the tokenizer trained on the text."""

import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lit_ppo.data.text import TextDataModule
from tests.helpers.tiny import make_tokenizer, write_rows

DOCUMENTS = ["the film was good", "a dull plot", "music"]
PAD, EOS = 0, 1


def write(path: Path, texts: list[str]) -> str:
    return write_rows(path, ({"text": text, "id": i} for i, text in enumerate(texts)))


def ready(path: str, **options: Any) -> TextDataModule:
    data = TextDataModule(path, **{"tokenizer": make_tokenizer(), "seed": 0} | options)
    data.prepare_data()
    data.setup("fit")
    return data


def ids_of(*texts: str) -> list[list[int]]:
    """Word by word, from the vocabulary."""
    vocabulary = make_tokenizer().get_vocab()
    return [[vocabulary[word] for word in text.split()] for text in texts]


def rows_of(loader: Any) -> list[list[int]]:
    """All rows of a loader without their padding, in a fixed order."""
    return sorted(
        ids[mask.bool()].tolist()
        for batch in loader
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )


def test_a_batch(tmp_path: Path) -> None:
    data = ready(write(tmp_path / "t.jsonl", DOCUMENTS), batch_size=3)
    [batch] = data.train_dataloader()
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), ((3, 5), torch.int64)
    )
    assert rows_of([batch]) == sorted([*row, EOS] for row in ids_of(*DOCUMENTS))
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        n = int(mask.sum())
        assert mask.tolist() == [1] * n + [0] * (5 - n)  # on the right
        assert ids[n:].tolist() == [PAD] * (5 - n)
        assert labels.tolist() == ids[:n].tolist() + [-100] * (5 - n)


def test_the_tokenizers_own_first_token_is_kept(tmp_path: Path) -> None:
    """On a document, and only on its first piece."""
    tokenizer = make_tokenizer(bos=True)
    whole = tokenizer("the film was")["input_ids"]
    assert whole[0] == tokenizer.bos_token_id
    data = ready(write(tmp_path / "t.jsonl", ["the film was"]), tokenizer=tokenizer, max_length=3)
    assert [row.tolist() for row in data.train_rows] == [whole[:3], [*whole[2:], EOS]]


def test_stop_token_is_learnt_where_it_also_pads(tmp_path: Path) -> None:
    """Labels go by the mask, not by the id."""
    tokenizer = make_tokenizer(pad=False)
    [batch] = ready(write(tmp_path / "t.jsonl", DOCUMENTS), batch_size=3, tokenizer=tokenizer).train_dataloader()
    eos = tokenizer.eos_token_id
    assert (batch["input_ids"] == eos).sum() == 3 + 1 + 3
    assert (batch["labels"] == eos).sum() == 3


def test_append_eos(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", ["the film", "a plot"])
    assert rows_of(ready(path, append_eos=False).train_dataloader()) == sorted(ids_of("the film", "a plot"))
    closed = write(tmp_path / "c.jsonl", ["the film [EOS]"])
    assert rows_of(ready(closed).train_dataloader()) == [[*ids_of("the film")[0], EOS]]  # not twice
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"TextDataModule\(append_eos=True\): .* has no end-of-text token"):
        ready(path, tokenizer=tokenizer)
    assert len(ready(path, tokenizer=tokenizer, append_eos=False).train_rows) == 2


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("max_length", [2, 3, 5, 100])
def test_every_token_but_the_first_is_predicted_once(tmp_path: Path, packing: bool, max_length: int) -> None:
    """Also the words where a document is cut, with the true word before each."""
    data = ready(write(tmp_path / "t.jsonl", DOCUMENTS), max_length=max_length, packing=packing)
    documents = [[*row, EOS] for row in ids_of(*DOCUMENTS)]
    if packing:
        documents = [[token for row in documents for token in row]]
    rows = rows_of(data.train_dataloader())
    predicted = Counter(pair for row in rows for pair in pairwise(row))
    assert predicted == Counter(pair for row in documents for pair in pairwise(row))
    assert max(map(len, rows)) == min(max_length, max(map(len, documents)))


def test_documents_without_a_next_token_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", DOCUMENTS)
    with pytest.warns(UserWarning, match=r"1 of 3 documents have fewer than two tokens"):
        data = ready(path, append_eos=False)
    assert len(data.train_rows) == 2
    with (
        pytest.warns(UserWarning, match="1 of 1 documents"),
        pytest.raises(ValueError, match="no document has two tokens"),
    ):
        ready(write(tmp_path / "s.jsonl", ["music"]), append_eos=False)


def test_split(tmp_path: Path) -> None:
    """Copies of a text are never on both sides; with ``split_column`` they can be, where their ids differ."""
    many = write(tmp_path / "m.jsonl", [" ".join(["the"] * (n % 20 + 1)) for n in range(80)])
    for column, apart in [(None, True), ("id", False)]:
        data = ready(many, val_fraction=0.5, split_column=column)
        train, val = ({len(row) for row in rows} for rows in (data.train_rows, data.val_rows))
        assert train | val == set(range(2, 22))
        assert (not train & val) == apart


# ---- the tokenizer trained on the text


def test_the_tokenizer_is_trained_on_the_training_text_and_used(tmp_path: Path) -> None:
    path, folder = write(tmp_path / "t.jsonl", ["THE FILM " * 20]), tmp_path / "tokenizer"
    options: dict[str, Any] = {"tokenizer": None, "tokenizer_path": str(folder), "lower_case": True}
    data = ready(path, tokenizer_vocab_size=270, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 258 < len(tokenizer) <= 270
    assert tokenizer.decode(data.train_rows[0].tolist(), skip_special_tokens=True).strip() == ("the film " * 20).strip()
    assert len(tokenizer(" film")["input_ids"]) == 1  # learnt in lower case
    stamp = os.stat(folder / "tokenizer.json").st_mtime_ns
    ready(path, tokenizer_vocab_size=270, **options)
    assert os.stat(folder / "tokenizer.json").st_mtime_ns == stamp  # written once
    ready(path, tokenizer_vocab_size=264, **options)
    assert len(AutoTokenizer.from_pretrained(folder)) <= 264
    ready(write(tmp_path / "t.jsonl", ["musical " * 20]), tokenizer_vocab_size=264, **options)
    assert len(AutoTokenizer.from_pretrained(folder)(" musical")["input_ids"]) < 3  # other text, other tokenizer


def test_held_out_text_does_not_shape_the_tokenizer(tmp_path: Path) -> None:
    path, val_path = write(tmp_path / "t.jsonl", ["film " * 20]), write(tmp_path / "v.jsonl", ["music " * 90])
    options: dict[str, Any] = {"tokenizer": None, "tokenizer_path": str(tmp_path / "k"), "tokenizer_vocab_size": 264}
    ready(path, val_path=val_path, **options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "k")
    assert len(tokenizer(" music")["input_ids"]) > len(tokenizer(" film")["input_ids"])


def test_a_tokenizer_of_another_origin_is_not_overwritten(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "k")
    path = write(tmp_path / "t.jsonl", DOCUMENTS)
    with pytest.raises(ValueError, match=r"TextDataModule\(tokenizer_path='.*k'\): .*has a tokenizer of another"):
        ready(path, tokenizer=None, tokenizer_path=str(tmp_path / "k"), tokenizer_vocab_size=300)
