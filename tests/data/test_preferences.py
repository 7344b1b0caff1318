"""Pairs and labelled texts: what a batch holds, by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ppo.data.preferences import PreferenceDataModule
from tests.helpers.tiny import make_tokenizer, write_rows

PAIRS = [
    {"prompt": "the film ", "chosen": "was really good", "rejected": "was bad", "id": "a"},
    {"prompt": "a plot ", "chosen": "happy", "rejected": "not happy but sad", "id": "b"},
]
LABELLED = [
    {"head": "good", "tail": "we loved it", "label": 1, "id": "a"},
    {"head": "it was dull", "tail": "bad", "label": 0, "id": "b"},
]
ALONE = [{name: value for name, value in row.items() if name != "prompt"} for row in PAIRS]
EDGES: dict[str, Any] = {"text_column": ["head", "tail"], "label_column": "label"}
Rows = set[tuple[Any, ...]]


def ready(path: str, **options: Any) -> PreferenceDataModule:
    data = PreferenceDataModule(path, **{"tokenizer": make_tokenizer(), "seed": 0} | options)
    data.setup("fit")
    return data


def texts_of(part: dict[str, torch.Tensor], tokenizer: Any = None) -> list[str]:
    tokenizer = tokenizer or make_tokenizer()
    return [
        " ".join(tokenizer.convert_ids_to_tokens(ids[mask.bool()].tolist()))
        for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
    ]


def examples(loader: Any, tokenizer: Any = None) -> Rows:
    """All examples of a loader: (chosen, rejected) or (text, label)."""
    found: Rows = set()
    for batch in loader:
        if "chosen" in batch:
            found |= set(zip(*(texts_of(batch[side], tokenizer) for side in ("chosen", "rejected")), strict=True))
        else:
            found |= set(zip(texts_of(batch, tokenizer), batch["labels"].tolist(), strict=True))
    return found


def test_pairs_and_their_columns(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", PAIRS)
    [batch] = ready(write_rows(tmp_path / "full.jsonl", ALONE)).train_dataloader()
    assert {side: part["input_ids"].shape for side, part in batch.items()} == {"chosen": (2, 3), "rejected": (2, 4)}
    assert examples([batch]) == {("was really good", "was bad"), ("happy", "not happy but sad")}
    short = texts_of(batch["chosen"]).index("happy")
    assert batch["chosen"]["attention_mask"][short].tolist() == [1, 0, 0]  # padded on the right
    assert batch["chosen"]["input_ids"][short, 1:].tolist() == [0, 0]
    swapped = ready(path, chosen_column="rejected", rejected_column="chosen")
    assert examples(swapped.train_dataloader()) == {
        ("the film was bad", "the film was really good"),
        ("a plot not happy but sad", "a plot happy"),
    }
    joined = {("the film was really good", "the film was bad"), ("a plot happy", "a plot not happy but sad")}
    for data in (ready(path, prompt_column="prompt"), ready(path), ready(PAIRS)):
        assert examples(data.train_dataloader()) == joined


@pytest.mark.parametrize("label", [0.0, False, "0"])
def test_labelled_texts(tmp_path: Path, label: Any) -> None:
    """Each text column is an example of its own."""
    path = write_rows(tmp_path / "p.jsonl", [LABELLED[0] | {"head": "GOOD"}, LABELLED[1] | {"label": label}])
    [batch] = ready(path, lower_case=True, **EDGES).train_dataloader()
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].dtype == torch.float32
    assert examples([batch]) == {("good", 1.0), ("we loved it", 1.0), ("it was dull", 0.0), ("bad", 0.0)}
    one = ready(path, text_column="tail", label_column="label")
    assert examples(one.train_dataloader()) == {("we loved it", 1.0), ("bad", 0.0)}


def test_long_texts_keep_their_end(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", ALONE)
    with pytest.warns(UserWarning, match=r"PreferenceDataModule\(max_length=2\): 2 of 4 texts .* longest has 4"):
        data = ready(path, max_length=2)
    assert examples(data.train_dataloader()) == {("really good", "was bad"), ("happy", "but sad")}


CHAT = {
    "prompt": [{"role": "user", "content": "The film"}],
    "chosen": [{"role": "assistant", "content": "Good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}
WHOLE = {side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}


@pytest.mark.parametrize(
    ("row", "prompt_column"),
    [
        (CHAT, "prompt"),
        (CHAT | {"chosen": "Good", "rejected": "bad"}, "prompt"),
        (CHAT | {"prompt": "The film"}, "prompt"),
        (WHOLE, None),
    ],
    ids=["messages", "plain answers", "plain prompt", "no prompt column"],
)
@pytest.mark.parametrize("bos", [False, True])
def test_chats(tmp_path: Path, row: dict[str, Any], prompt_column: str | None, bos: bool) -> None:
    """By the template, with one BOS and no opening of a further answer."""
    tokenizer = make_tokenizer(bos=bos, chat=True)
    path = write_rows(tmp_path / "p.jsonl", [row])
    data = ready(path, prompt_column=prompt_column, lower_case=True, tokenizer=tokenizer)
    front = ("[BOS] " if bos else "") + "user the film [EOS] assistant"
    assert examples(data.train_dataloader(), tokenizer) == {(f"{front} good [EOS]", f"{front} bad [EOS]")}


def test_validation_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", PAIRS)
    data = ready(path, val_path=write_rows(tmp_path / "v.jsonl", PAIRS[::-1]), batch_size=1)
    held_out = [["a plot happy"], ["the film was really good"]]
    assert [texts_of(batch["chosen"]) for batch in data.val_dataloader()] == held_out
    with pytest.raises(ValueError, match=r"\(val_path=<list of 2>\): <list of 2> has no column 'prompt'"):
        ready(path, val_path=ALONE)
    with pytest.raises(ValueError, match=r"\(path=<list of 2>\): <list of 2> has no column 'prompt'"):
        ready(ALONE, val_path=PAIRS)  # type: ignore[arg-type]
    assert ready(path).val_dataloader() == []
    rows: list[Any] = [{"head": " ".join(["the"] * (i % 20 + 1)), "tail": "film", "label": i % 2} for i in range(80)]
    split = ready(write_rows(tmp_path / "t.jsonl", rows), val_fraction=0.5, **EDGES)
    train, val = ({len(ids) for ids, _ in side} - {1} for side in (split.train_rows, split.val_rows))
    assert not train & val  # copies of a row are never on both sides
    assert len(split.train_rows) + len(split.val_rows) == 160


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"chosen": "good"}, {}, r"line 2: no value for column 'rejected', only for \['chosen'\]"),
        ({"chosen": "", "rejected": "bad"}, {}, r"line 2: empty 'chosen'"),
        ({"chosen": CHAT["chosen"], "rejected": CHAT["rejected"]}, {}, "line 2: chat messages and plain text"),
        ({"chosen": "good", "rejected": CHAT["rejected"]}, {}, "line 2: chat messages and plain text are mixed"),
        ({"head": "good", "tail": "bad", "label": "pos"}, EDGES, r"line 2: label 'pos' in column 'label'; give 0"),
        ({"head": "good", "tail": "bad", "label": 2}, EDGES, r"line 2: label 2 in column 'label'; give 0"),
        ({"head": "good", "tail": "bad", "label": -1}, EDGES, r"line 2: label -1 in column 'label'; give 0"),
        ({"head": "good", "tail": "bad", "label": 10**400}, EDGES, r"line 2: label 10{79} in column 'label'; give 0"),
        ({"head": "good", "tail": " ", "label": 1}, EDGES, r"line 2: empty 'tail'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "p.jsonl", [LABELLED[0] if options else ALONE[0], row])
    with pytest.raises(ValueError, match=r"^PreferenceDataModule\(path='.*p.jsonl'\): .*p.jsonl, " + message):
        ready(path, tokenizer=make_tokenizer(chat=True), **options)


USER, GOOD, BAD = ({"role": r, "content": c} for r, c in [("user", "it"), ("assistant", "good"), ("assistant", "bad")])
SYSTEM = {"role": "system", "content": "we"}


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("it", [USER]),  # UltraFeedback: the prompt as text, full conversations as answers
        ("it ", [SYSTEM, USER]),
        ([USER], [USER]),
        ([SYSTEM, USER], [SYSTEM, USER]),
        ([SYSTEM, USER], []),
        ("it", []),
        ("it", [SYSTEM]),
    ],
)
def test_a_prompt_is_seen_once(tmp_path: Path, prompt: Any, start: list[Any]) -> None:
    rows = [{"prompt": prompt, "chosen": [*start, GOOD], "rejected": [*start, BAD]}]
    tokenizer = make_tokenizer(chat=True, words=["we", "it", "good", "bad", "user", "assistant", "system"])
    data = ready(write_rows(tmp_path / "p.jsonl", rows), prompt_column="prompt", tokenizer=tokenizer)
    system = "system we [EOS] " if SYSTEM in [*start, *prompt] else ""
    sides = tuple(f"{system}user it [EOS] assistant {word} [EOS]" for word in ("good", "bad"))
    assert examples(data.train_dataloader(), tokenizer) == {sides}


def test_plain_answers_that_all_begin_with_the_prompt_include_it(tmp_path: Path) -> None:
    full = [
        {**row, "chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PAIRS
    ]
    alone = ready(write_rows(tmp_path / "alone.jsonl", PAIRS), prompt_column="prompt")
    path = write_rows(tmp_path / "full.jsonl", full)
    assert examples(ready(path, prompt_column="prompt").train_dataloader()) == examples(alone.train_dataloader())
    mixed = write_rows(tmp_path / "mixed.jsonl", [*full, PAIRS[0]])
    with pytest.raises(
        ValueError, match=r"mixed.jsonl, line 3: the answer does not begin with the prompt, but 4 of 6 do"
    ):
        ready(mixed, prompt_column="prompt")


def test_an_answer_that_begins_with_another_user_turn_is_refused(tmp_path: Path) -> None:
    other = {"role": "user", "content": "we"}
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "it", "chosen": [other, GOOD], "rejected": [other, BAD]}])
    with pytest.raises(
        ValueError, match=r"p.jsonl, line 1: the answer begins with a user turn that is not the prompt's"
    ):
        ready(path, prompt_column="prompt", tokenizer=make_tokenizer(chat=True))


@pytest.mark.parametrize(
    "answers", [["Human: it Assistant: good", "Human: it Assistant: bad"], ["say it so", "say it"]]
)
def test_prompts_inside_of_complete_texts_are_refused_unless_named(answers: list[str]) -> None:
    """A prompt in front would stand there twice."""
    rows: Any = [{"prompt": "it ", "chosen": answers[0], "rejected": answers[1]}]
    with pytest.raises(ValueError, match=r"2 of 2 texts hold the prompt, but not all begin with it; rename the column"):
        ready(rows)
    tokenizer = make_tokenizer(words=["it", *" ".join(answers).split()])
    named = ready(rows, prompt_column="prompt", tokenizer=tokenizer)
    assert examples(named.train_dataloader(), tokenizer) == {tuple(f"it {answer}" for answer in answers)}


def test_labelled_texts_without_their_prompts_are_warned_of() -> None:
    texts = ["the film was good", "was good"]
    rows: Any = [{"prompt": "the film", "text": text, "label": i} for i, text in enumerate(texts)]
    options: dict[str, Any] = {"text_column": "text", "label_column": "label"}
    with pytest.warns(UserWarning, match="the column 'prompt' is left out, since a labelled text must include"):
        ready(rows, **options)
    ready(rows[:1], **options)  # no warning, which would be an error


def test_rows_that_teach_nothing_are_warned_of() -> None:
    rows: Any = [PAIRS[0], PAIRS[1] | {"rejected": PAIRS[1]["chosen"]}]
    with pytest.warns(UserWarning, match="in 1 of 2 pairs chosen and rejected have the same tokens"):
        ready(rows)
    cut: Any = [{"prompt": "the", "chosen": "good film story", "rejected": "bad film story"}]
    with (
        pytest.warns(UserWarning, match="2 of 2 texts are longer"),
        pytest.warns(UserWarning, match=r"in 1 of 1 pairs .* same tokens \(cut to max_length=2\)"),
    ):
        ready(cut, max_length=2)
    with pytest.warns(UserWarning, match="all labels are 1, so there is nothing to tell apart"):
        ready([row | {"label": 1} for row in LABELLED], **EDGES)  # type: ignore[arg-type]
