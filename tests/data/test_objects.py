"""Rows of Python objects: whatever holds them, the batches are those of the same rows in a file."""

import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from lit_ppo.data.files import read_table
from lit_ppo.data.preferences import PreferenceDataModule
from lit_ppo.data.prompts import PromptDataModule
from lit_ppo.data.text import TextDataModule
from lit_ppo.ppo.prompts import as_batch
from lit_ppo.rewards import RewardModel, as_source
from lit_ppo.supervised.sft import LitSFT
from tests.helpers.tiny import make_causal_lm, make_reward_model, make_tokenizer, write_rows
from tests.helpers.toys import make_module

ROWS = [{"prompt": text, "id": i} for i, text in enumerate(["the film", "a plot", "music", "it was"])]
CHAT = [{"role": "user", "content": "a film"}]


class MapStyle(torch.utils.data.Dataset):
    """As torch has them: a length, items, no end of iteration."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return ROWS[index % len(ROWS)]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(ROWS)


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(ROWS)


class Frame:
    """As pandas has it: iterates over the names of its columns."""

    columns = ("prompt", "id")

    def __iter__(self) -> Any:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(ROWS)

    def to_dict(self, kind: str) -> Any:
        return ROWS if kind == "records" else None


def hub(make: Callable[[Any, Path], Any]) -> Callable[[Path], Any]:
    """Something of the datasets package, which need not be installed."""

    def build(tmp_path: Path) -> Any:
        datasets = pytest.importorskip("datasets")
        return make(datasets.Dataset.from_list(ROWS), tmp_path)

    return build


def saved(data: Any, path: Path) -> str:
    data.save_to_disk(str(path / "saved"))
    return str(path / "saved")


def saved_splits(data: Any, path: Path) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(train=data.select([0]), test=data).save_to_disk(str(path / "splits"))
    return str(path / "splits") + ":test"


HELD: dict[str, Callable[[Path], Any]] = {
    "list": lambda _: ROWS,
    "columns": lambda _: {name: [row[name] for row in ROWS] for name in ("prompt", "id")},
    "map-style": lambda _: MapStyle(),
    "sized stream": lambda _: SizedStream(),
    "data frame": lambda _: Frame(),
    "Dataset": hub(lambda data, _: data),
    "DatasetDict": hub(lambda data, _: pytest.importorskip("datasets").DatasetDict(train=data)),
    "save_to_disk": hub(saved),
    "save_to_disk with splits": hub(saved_splits),
    "take": hub(lambda data, _: data.to_iterable_dataset().take(4)),
}


def batches(data: Any) -> list[Any]:
    data.setup("fit")
    return [vars(batch) if hasattr(batch, "prompts") else batch for batch in data.train_dataloader()]


@pytest.mark.parametrize("name", HELD)
def test_prompts(tmp_path: Path, name: str) -> None:
    """Read twice, as ``setup`` may be, with rows held out as in a file, and columns for the reward."""
    options: dict[str, Any] = {"tokenizer": make_tokenizer(), "batch_size": 3, "seed": 0, "val_fraction": 0.3}
    expected = PromptDataModule(write_rows(tmp_path / "rows.jsonl", ROWS), **options)
    given = PromptDataModule(HELD[name](tmp_path), **options)
    given.setup("validate")
    assert repr(batches(given)) == repr(batches(expected))
    assert repr([*given.val_dataloader()]) == repr([*expected.val_dataloader()])


@pytest.mark.parametrize("rows", [[row["prompt"] for row in ROWS], [CHAT, CHAT]])
def test_rows_without_names(rows: Any) -> None:
    prompts = PromptDataModule(rows, tokenizer=make_tokenizer(chat=True), seed=0)
    prompts.setup("fit")
    batch = prompts.peek("train", len(rows))
    assert batch is not None
    assert (batch.columns.get("messages") or batch.prompts) == rows


def array(*values: Any) -> Any:
    """Of one dimension, whatever the values hold."""
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made


TOOL_CALL = {"role": "assistant", "content": "a", "tool_calls": [{"name": "n", "arguments": {"ids": [1, 2]}}]}
IN_ARRAYS = TOOL_CALL | {"tool_calls": array({"name": np.str_("n"), "arguments": {"ids": np.array([1, 2])}})}


@pytest.mark.parametrize("hold", [array, lambda *turns: turns], ids=["array", "tuple"])
def test_messages_in_arrays_and_tuples_are_lists(hold: Any) -> None:
    """As in a Parquet file that pandas has read; other columns are as they were."""
    tokenizer = make_tokenizer(chat=True)
    chat, expected = hold(MappingProxyType(CHAT[0]), IN_ARRAYS, CHAT[0]), [*CHAT, TOOL_CALL, *CHAT]
    row = {"prompt": chat, "tools": hold({"name": "n"}), "ids": np.array([1, 2]), "pair": (1, "a")}
    prompts = PromptDataModule([row], tokenizer=tokenizer, seed=0)
    with pytest.warns(UserWarning, match="does not get the column 'tools'"):
        prompts.setup("fit")
    assert json.dumps([prompts.columns["messages"], prompts.columns["tools"]]) == json.dumps(
        [[expected], [[{"name": "n"}]]]
    )
    assert prompts.columns["ids"][0] is row["ids"]
    assert prompts.columns["pair"] == [(1, "a")]
    for held in ([chat], {"prompt": [chat]}, [{"prompt": chat}]):
        assert as_batch(held, tokenizer).columns["messages"] == [expected]
    text = TextDataModule([{"messages": hold(*CHAT, TOOL_CALL)}], tokenizer=tokenizer, seed=0)
    pairs = [{"prompt": hold(*CHAT), "chosen": hold(TOOL_CALL), "rejected": hold(TOOL_CALL | {"content": "film"})}]
    for data in (text, PreferenceDataModule(pairs, tokenizer=tokenizer, seed=0)):
        data.setup("fit")
        ids = data.train_rows[0][0]
        assert tokenizer.decode(list(ids)) == "user a film [EOS] assistant a [EOS]"


def test_data_sets_in_numpys_format(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    chats = datasets.Dataset.from_list([{"prompt": CHAT}] * 2).with_format("numpy")
    chats.save_to_disk(str(tmp_path / "saved"))
    for held in (chats, str(tmp_path / "saved")):
        data = PromptDataModule(held, tokenizer=make_tokenizer(chat=True), seed=0)
        data.setup("fit")
        assert data.columns["messages"] == [CHAT] * 2


def test_text_and_preferences(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer": make_tokenizer(), "batch_size": 4, "seed": 0}
    texts = [row["prompt"] for row in ROWS]
    file = write_rows(tmp_path / "t.jsonl", ({"text": text} for text in texts))
    assert repr(batches(TextDataModule(texts, **options))) == repr(batches(TextDataModule(file, **options)))
    pairs = [{"chosen": "good " + text, "rejected": text} for text in texts]
    expected = PreferenceDataModule(write_rows(tmp_path / "p.jsonl", pairs), **options)
    assert repr(batches(PreferenceDataModule(pairs, **options))) == repr(batches(expected))


def test_a_stream_states_how_many_rows(tmp_path: Path) -> None:
    """Read once: generators give their rows only once."""
    data = PromptDataModule((row for row in ROWS), tokenizer=make_tokenizer(), max_rows=3, seed=0)
    data.setup("fit")
    data.setup("fit")
    assert data.columns == {"id": [0, 1, 2]}
    with pytest.raises(ValueError, match=r"\(path=<Stream>\): the stream .* does not say how many rows.*give max_rows"):
        PromptDataModule(Stream(), tokenizer=make_tokenizer()).setup("fit")
    assert len(read_table("w", write_rows(tmp_path / "r.jsonl", ROWS), max_rows=3)) == 3


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (7, "w: 7 holds no rows; give a path"),
        ([], "w: <list of 0> has no rows"),
        ([{"prompt": "a"}, "b"], "w: row 2 is str 'b', not a mapping of named columns"),
        ({"a": [1], "b": [1, 2]}, "columns of one length, but they have {'a': 1, 'b': 2}"),
        ({"a": "text"}, "columns of one length, but they have {'a': None}"),
    ],
)
def test_other_objects_are_refused(held: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_table("w", held)
    assert message in str(error.value)


@pytest.mark.parametrize("argument", ["path", "val_path"])
@pytest.mark.parametrize("kind", [PromptDataModule, TextDataModule, PreferenceDataModule])
def test_a_list_of_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, argument: str) -> None:
    """As the datasets package takes one: the names would be the prompts."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a", "text": "the film", "chosen": "good", "rejected": "bad"}]
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "there").mkdir()
    write_rows(tmp_path / "there" / "my notes", rows)
    for names in (["a.jsonl", "b.jsonl"], ["b.CSV.gz", "a film"], ("my notes", "b"), [Path("a.jsonl")]):
        data = kind(**{"path": rows, argument: names}, data_root="there", tokenizer=make_tokenizer())
        with pytest.raises(
            ValueError, match=rf"\({argument}=<.* of .>\): row . is '.*', the name of a file; give one file"
        ) as e:
            data.setup("fit")
        assert ("write it as" in str(e.value)) == (kind is not PreferenceDataModule)


def test_texts_that_are_no_files_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So are those that only speak of files, and names in a column."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plot").mkdir()
    with pytest.raises(ValueError, match=r"row 2 is 'b.tsv', the name of a file"):
        read_table("w", ["a film", "b.tsv"], column="prompt")
    texts = ["plot", "read a.jsonl", "a.jsonl is a film", "\0", "x" * 5000]
    assert read_table("w", texts, column="prompt").rows == [{"prompt": text} for text in texts]
    assert read_table("w", [{"prompt": "a.jsonl"}]).rows == [{"prompt": "a.jsonl"}]


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    path = HELD["save_to_disk with splits"](tmp_path).replace(":test", ":dev")
    with pytest.raises(ValueError, match=r"has the splits train, test, but no 'dev'"):
        read_table("w", path)


def test_held_out_rows_are_of_no_default_split() -> None:
    splits = pytest.importorskip("datasets").DatasetDict(train=HELD["Dataset"](Path()))
    data = PromptDataModule(ROWS, val_path=splits, tokenizer=make_tokenizer())
    with pytest.raises(
        ValueError, match=r"\(val_path=<DatasetDict of 1>\): it has the splits train; give the data set"
    ):
        data.setup("fit")


def test_model_objects_are_told_what_to_do(tmp_path: Path) -> None:
    source = RewardModel(str(make_reward_model(tmp_path / "reward")))
    source.build()
    path = make_causal_lm(tmp_path / "lm")
    for make, message in (
        (lambda: make_module(path, reference=source.model), r"LitPPO\(reference=GPT2.*\): give a path or hub name"),
        (lambda: RewardModel(source.model), r"RewardModel\(model=GPT2ForSequenceClassification\): give a path"),
        (lambda: LitSFT(path, source.tokenizer), r"LitSFT\(tokenizer=.*save it by tokenizer.save_pretrained"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError, match=r"scores token ids, not responses; .*RewardModel\('folder'\)"):
        as_source({"judge": source.model})
