"""Prompts: their ids against the tokenizer's own, what a batch holds, the split, and errors that name the place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors

from lit_ppo.data.batch import PromptOrder
from lit_ppo.data.encoding import encode_prompts, padding_id
from lit_ppo.data.prompts import PromptDataModule
from lit_ppo.digest import unit_hash
from tests.helpers.tiny import make_tokenizer, write_rows

TURNS = [("user", "the plot"), ("assistant", "dull"), ("user", "but")]
CHAT = [
    [{"role": "user", "content": "was it good"}],
    [{"role": role, "content": content} for role, content in TURNS],
]
ROWS = [
    {"prompt": "the film was", "id": "a", "label": 1},
    {"prompt": "We SAW a movie", "id": "b", "label": 0},
    {"prompt": "music", "id": "c"},
]


def ready(path: str, stage: str = "fit", **options: Any) -> PromptDataModule:
    data = PromptDataModule(path, **{"tokenizer": make_tokenizer(), "batch_size": 2, "seed": 0} | options)
    data.setup(stage)
    return data


def in_order(data: PromptDataModule) -> dict[str, list[int]]:
    """Ids of the training prompts by their text."""
    batches = list(data.train_dataloader())
    return {text: ids for batch in batches for text, ids in zip(batch.prompts, batch.prompt_ids, strict=True)}


# ---- encoding


@pytest.mark.parametrize("bos", [False, True])
def test_plain_prompts_have_the_tokenizers_own_ids_and_one_bos(bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    prompts = ["the film", "good", *(["[BOS] good"] if bos else [])]
    texts, ids = encode_prompts(tokenizer, prompts)
    assert texts == prompts
    words = tokenizer.convert_tokens_to_ids(["the", "film", "good"])
    front = [tokenizer.bos_token_id] if bos else []
    assert ids == [[*front, *words[:2]], [*front, words[2]], [*front, words[2]]][: len(prompts)]


def test_a_prompt_is_left_open() -> None:
    """A tokenizer that closes every text would have the model continue behind its end."""
    tokenizer = make_tokenizer()
    open_ids = encode_prompts(tokenizer, ["the film"])[1]
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", eos)]
    )
    assert tokenizer("the film")["input_ids"][-1] == eos
    assert encode_prompts(tokenizer, ["the film"])[1] == open_ids
    assert encode_prompts(tokenizer, ["the film [EOS]"])[1][0][-1] == eos  # asked for


@pytest.mark.parametrize("bos", [False, True])
def test_chat_prompts_have_the_templates_ids(bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos, chat=True)
    texts, ids = encode_prompts(tokenizer, CHAT)
    for messages, text, row in zip(CHAT, texts, ids, strict=True):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert row == expected
        assert text == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert row[-1] == tokenizer.convert_tokens_to_ids("assistant")
        assert row.count(tokenizer.bos_token_id) == int(bos)


def test_long_prompts_are_cut_from_the_left_with_one_warning() -> None:
    tokenizer = make_tokenizer(bos=True)
    prompts = ["the film was good", "a dull plot we saw", "bad"]
    whole = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    with pytest.warns(UserWarning, match=r"max_length=3\): 2 of 3 prompts are longer .* longest has 6") as record:
        texts, ids = encode_prompts(tokenizer, prompts, max_length=3)
    assert len(record) == 1
    assert texts == prompts  # the reward reads the whole text
    assert ids == [[row[0], *row[-2:]] for row in whole[:2]] + [whole[2]]
    tokenizer = make_tokenizer()
    with pytest.warns(UserWarning, match="1 of 2"):
        ids = encode_prompts(tokenizer, ["the film was good", "bad bad bad"], max_length=3)[1]
    assert ids == [tokenizer("film was good")["input_ids"], tokenizer("bad bad bad")["input_ids"]]


def test_prompts_that_cannot_be_encoded() -> None:
    with pytest.raises(ValueError, match=r"plain and chat prompts are mixed"):
        encode_prompts(make_tokenizer(chat=True), ["the film", CHAT[0]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"has no chat template; use the tokenizer of a chat model"):
        encode_prompts(make_tokenizer(), CHAT)
    with pytest.raises(ValueError, match=r"the prompt ' ' has no token"):
        encode_prompts(make_tokenizer(), [" "])
    assert encode_prompts(make_tokenizer(), []) == ([], [])


def test_padding_falls_back_to_the_stop_token() -> None:
    tokenizer = make_tokenizer(pad=False)
    assert padding_id("X", tokenizer) == tokenizer.eos_token_id
    assert padding_id("X", make_tokenizer()) == 0
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"X: the tokenizer .* has neither a padding nor an end-of-text token"):
        padding_id("X", tokenizer)


def test_long_tokenising_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("lit_ppo.data.encoding.TEXTS_AT_ONCE", 2)
    texts = ["the", "the film", "good", "was it", "bad"]
    tokenizer = make_tokenizer()
    with caplog.at_level("INFO"):
        expected = encode_prompts(tokenizer, texts)[1]
        assert "Tokenised" not in caplog.text
        monkeypatch.setattr("lit_ppo.data.encoding.SECONDS_BETWEEN_LOGS", -1.0)
        assert encode_prompts(tokenizer, texts)[1] == expected == [tokenizer(text)["input_ids"] for text in texts]
    assert [record.message for record in caplog.records] == [f"Tokenised {n} of 5 texts" for n in (2, 4, 5)]


# ---- batches


def test_a_batch_holds_prompts_rows_and_the_other_columns(tmp_path: Path) -> None:
    data = ready(write_rows(tmp_path / "p.jsonl", ROWS))
    first, second = data.train_dataloader()
    rows = np.random.default_rng([0, 0]).permutation(3).tolist()
    assert first.prompt_index.tolist() + second.prompt_index.tolist() == rows
    assert first.prompt_index.dtype == torch.int64
    assert [*first.prompts, *second.prompts] == [ROWS[i]["prompt"] for i in rows]
    assert first.columns == {"id": [ROWS[i]["id"] for i in rows[:2]], "label": [ROWS[i].get("label") for i in rows[:2]]}
    assert data.columns == {"id": ["a", "b", "c"], "label": [1, 0, None]}
    assert len(first) == 2
    assert len(data.train_dataloader()) == 2
    assert max(data.prompt_lengths) == 4
    moved = first.to("meta")
    assert moved.prompt_index.device.type == "meta"
    assert moved.prompt_ids is first.prompt_ids


def test_chat_prompts_come_from_their_column_and_are_handed_on_as_messages(tmp_path: Path) -> None:
    """Rewards take that column for chat prompts; beside plain ones it is left out with a warning."""
    tokenizer = make_tokenizer(chat=True)
    path = write_rows(tmp_path / "p.jsonl", [{"conversation": chat, "id": i} for i, chat in enumerate(CHAT)])
    data = ready(path, prompt_column="conversation", tokenizer=tokenizer)
    assert data.columns == {"messages": CHAT, "id": [0, 1]}
    batch = next(iter(data.train_dataloader()))
    assert batch.columns["messages"] == [CHAT[i] for i in batch.prompt_index]
    assert (batch.prompts, batch.prompt_ids) == encode_prompts(tokenizer, batch.columns["messages"])
    path = write_rows(tmp_path / "q.jsonl", [{"prompt": "the film", "messages": CHAT[0], "level": 1}])
    with pytest.warns(UserWarning, match="the column 'messages' is left out"):
        assert ready(path).columns == {"level": [1]}


def test_the_seed_is_that_of_seed_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "the"}] * 50)

    def order(**options: Any) -> list[list[int]]:
        torch.manual_seed(0)
        batches = [batch.prompt_index.tolist() for batch in ready(path, **options).train_dataloader()]
        assert torch.initial_seed() == 0
        assert torch.rand(1).item() == pytest.approx(0.4962566)  # the first number from seed 0: drawing took none
        return batches

    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert order(seed=None) == order(seed=2) != order(seed=0)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert order(seed=None) == order(seed=0)


def test_tokenizer_from_a_folder_from_the_module_or_missing(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer", words=["music"])
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "music"}])
    assert in_order(ready(path, tokenizer=str(tmp_path / "tokenizer"))) == {"music": [3]}
    with pytest.raises(ValueError, match=r"PromptDataModule\(tokenizer=None\): there is no module being trained"):
        ready(path, tokenizer=None)
    with pytest.raises(ValueError, match=r"^PromptDataModule\(tokenizer='.*nowhere'\): it cannot be loaded") as error:
        ready(path, tokenizer=str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


# ---- weights


@pytest.mark.parametrize("container", [list, np.array, torch.tensor])
def test_weights_are_set_and_checked(tmp_path: Path, container: Any) -> None:
    data = ready(write_rows(tmp_path / "p.jsonl", ROWS))
    data.set_weights(container([0.0, 2.0, 0.0]))
    for weights, message in (
        ([1.0, 1.0], r"shape \(2,\), but there are 3 training rows"),
        ([1.0, -1.0, 1.0], "the weight of row 1 is -1.0"),
        ([1.0, 1.0, float("nan")], "the weight of row 2 is nan"),
        ([0.0, 0.0, 0.0], "all weights are 0"),
    ):
        with pytest.raises(ValueError, match=f"^PromptDataModule.set_weights: {message}"):
            data.set_weights(container(weights))
    for _ in range(2):
        assert [batch.prompt_index.tolist() for batch in data.train_dataloader()] == [[1], [1]]
        data.setup("fit")  # holds for the run that follows
    data.set_weights(None)
    assert sorted(i for batch in data.train_dataloader() for i in batch.prompt_index.tolist()) == [0, 1, 2]


def test_rows_come_in_proportion_to_their_weights() -> None:
    """10 to 1, at 100 rows and 64 a batch, where drawing without replacement gives 3.2 to 1."""
    weights = np.repeat([10.0, 1.0], 50)
    order = PromptOrder(100, batch_size=64, seed=0)
    order.weights = weights
    counts = np.array([np.bincount(order.rows(update), minlength=100) for update in range(1000)])
    assert counts[:, :50].sum() / counts[:, 50:].sum() == pytest.approx(10, rel=0.02)
    assert (abs(counts - 64 * weights / weights.sum()) < 1).all()  # rounded up or down
    assert abs(np.corrcoef(counts[:, :50].T)[np.triu_indices(50, 1)]).max() < 0.2  # neighbours are not tied together


# ---- stages and splits


def test_held_out_files_come_in_order_and_are_named_where_they_lack_or_are_wrong(tmp_path: Path) -> None:
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", [{"prompt": p} for p in (name, "the")]) for name in "abcd"}
    options = {"val_path": paths["b"], "test_path": paths["c"], "predict_path": paths["d"], "batch_size": 1}
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": ""}])
    stages = {"fit": ("val", "b"), "validate": ("val", "b"), "test": ("test", "c"), "predict": ("predict", "d")}
    for stage, (split, name) in stages.items():
        loader: Any = getattr(ready(paths["a"], stage, **options), f"{split}_dataloader")()
        assert [batch.prompts for batch in loader] == [[name], ["the"]]
        assert [batch.prompt_index.tolist() for batch in loader] == [[0], [1]]
        assert len(loader) == 2
        with pytest.raises(ValueError, match=rf"^PromptDataModule\({split}_path='.*bad.jsonl, line 1: empty 'prompt'"):
            ready(paths["a"], stage, **{f"{split}_path": bad})
        if stage != "fit":
            with pytest.raises(ValueError, match=rf"PromptDataModule\({split}_path=None\): there are no prompts"):
                getattr(ready(paths["a"], stage), f"{split}_dataloader")()
    assert ready(paths["a"]).val_dataloader() == []
    with pytest.raises(FileNotFoundError, match=r"^PromptDataModule\(val_path='no.jsonl'\): .*no.jsonl does not exist"):
        ready(paths["a"], val_path="no.jsonl")
    with pytest.raises(RuntimeError, match=r"PromptDataModule.columns: .*call setup\('fit'\) first"):
        _ = PromptDataModule(paths["a"]).columns


@pytest.fixture
def many(tmp_path: Path) -> tuple[str, list[dict[str, Any]]]:
    rows = [{"prompt": f"the film {i}", "author": i // 2} for i in range(600)]
    return write_rows(tmp_path / "many.jsonl", rows), rows


def sides(data: PromptDataModule) -> tuple[set[str], set[str]]:
    held_out = {prompt for batch in data.val_dataloader() for prompt in batch.prompts}
    return set(in_order(data)), held_out


def test_split_by_hash(many: tuple[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    """About the fraction asked for, the same whatever the order of rows, their number and the seed."""
    path, rows = many
    train, val = sides(ready(path, val_fraction=0.2))
    assert train | val == {row["prompt"] for row in rows}
    assert not train & val
    assert abs(len(val) - 120) < 4 * np.sqrt(600 * 0.2 * 0.8)
    assert sides(ready(write_rows(tmp_path / "back.jsonl", rows[::-1]), val_fraction=0.2, seed=9)) == (train, val)
    half = sides(ready(write_rows(tmp_path / "half.jsonl", rows[:300]), val_fraction=0.2))
    assert half[1] == val & {row["prompt"] for row in rows[:300]}
    assert sides(ready(path, val_fraction=0.4))[1] > val
    data = ready(path, "validate", val_fraction=0.2)
    assert {prompt for batch in data.val_dataloader() for prompt in batch.prompts} == val


def test_rows_that_share_the_split_column_stay_together(many: tuple[str, list[dict[str, Any]]]) -> None:
    """And the columns of training rows follow the split."""
    path, rows = many
    authors = {row["prompt"]: row["author"] for row in rows}
    apart, together = (ready(path, val_fraction=0.2, split_column=column) for column in (None, "author"))
    shared = [{authors[p] for p in side} & {authors[p] for p in other} for side, other in map(sides, (apart, together))]
    assert shared[0]
    assert not shared[1]
    for batch in apart.train_dataloader():
        assert [apart.columns["author"][i] for i in batch.prompt_index] == [authors[p] for p in batch.prompts]


def test_the_split_is_the_same_on_every_machine() -> None:
    """First 48 bits of SHA-256 of the text, worked out with sha256sum; a number counts as its digits, as in a CSV."""
    assert unit_hash(["train/pos/5235"]) == int("dc43c2ee9bd9", 16) / 2**48
    assert unit_hash([12]) == unit_hash(["12"])
    assert unit_hash(["a", "b"]) != unit_hash(["ab"])


# ---- errors


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "the"}, {"prompt": "  "}], r"p.jsonl, line 2: empty 'prompt'; fill it in or delete the row"),
        ([{"prompt": "the"}, {"prompt": 7}], r"p.jsonl, line 2: column 'prompt' holds int '7', not text"),
        ([{"prompt": "the"}, {"id": 7}], r"p.jsonl, line 2: no value for column 'prompt', only for \['id'\]"),
        ([{"text": "the", "id": 1}], r"p.jsonl has no column 'prompt', only \['text', 'id'\]; name one of these"),
        ([{"prompt": CHAT[0]}, {"prompt": "the"}], r"p.jsonl, line 2: plain and chat prompts are mixed"),
        ([{"prompt": []}], r"p.jsonl, line 1: 'prompt' is '\[\]', not chat messages of text"),
        ([{"prompt": [{"role": "user", "content": 1}]}], r"line 1: 'prompt' is .*, not chat messages of text"),
        ([{"prompt": [{"role": "user", "content": " "}]}], r"line 1: the last message of 'prompt' is empty"),
        ([{"prompt": CHAT[0], "messages": "x"}], r"passed on as 'messages', but another column has this name"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ready(write_rows(tmp_path / "p.jsonl", rows), tokenizer=make_tokenizer(chat=True))
    assert str(error.value).startswith(f"PromptDataModule(path='{tmp_path / 'p.jsonl'}'): ")
    assert "\n" not in str(error.value)


def test_a_split_that_cannot_be_made(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", ROWS)
    assert ready(path, val_fraction=1e-9).n_rows == 2  # at least one prompt is held out
    with pytest.raises(ValueError, match=r"val_fraction=1e-09 leaves no validation rows of 1"):
        ready(write_rows(tmp_path / "one.jsonl", ROWS[:1]), val_fraction=1e-9)
    with pytest.raises(
        ValueError, match=r"no validation rows of 9; all have the same prompt, and copies stay together"
    ):
        ready(write_rows(tmp_path / "same.jsonl", ROWS[:1] * 9), val_fraction=0.2)
    with pytest.raises(ValueError, match=r"val_fraction=0.999999 leaves no training rows of 3"):
        ready(path, val_fraction=0.999999)
    with pytest.raises(ValueError, match=r"p.jsonl has no column 'author', only \['prompt', 'id', 'label'\]"):
        ready(path, val_fraction=0.5, split_column="author")
    with pytest.raises(ValueError, match=r"p.jsonl, line 3: no value for column 'label'"):
        ready(path, val_fraction=0.5, split_column="label")
