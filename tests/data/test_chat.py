"""Chats: what of them has a loss in SFT, options of the template, chats that a template refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_ppo.data.preferences import PreferenceDataModule
from lit_ppo.data.prompts import PromptDataModule
from lit_ppo.data.text import TextDataModule
from lit_ppo.ppo.prompts import as_batch
from tests.helpers.tiny import write_rows

HEAD = "{% for m in messages %}<|start|>{{ m.role }}\n"
ASK = "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{{ '<think>\n' if thinks }}{% endif %}"
CHATML = HEAD + "{{ m.content }}<|end|>\n" + ASK
MARKED = HEAD + (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{{ '\n' }}"
) + ASK  # fmt: skip
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "[{{ m.role }}]{{ m.content | trim }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
LAST_ONLY = HEAD + "{{ '<think>\n' if loop.last and m.role == 'assistant' }}{{ m.content }}<|end|>\n" + ASK
REWRITES = HEAD + "{{ m.content if loop.last else m.content.split('k')[-1] }}<|end|>\n" + ASK


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": {"u": "user", "a": "assistant", "s": "system"}[role], "content": content}


QUESTION, ANSWER = turn("u", "the film?"), turn("a", "\n\nwas good")
TWO_TURNS = [turn("s", "be kind"), QUESTION, ANSWER, turn("u", "and?"), turn("a", "bad \n")]


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Every byte is a token, except that two line breaks are one, and that " g" is one."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    newline, space = "Ċ", "Ġ"
    vocabulary = letters | {newline * 2: 256, space + "g": 257}
    backend = Tokenizer(models.BPE(vocabulary, [(newline, newline), (space, "g")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", chat_template=template,
        extra_special_tokens=["<|start|>"],
    )  # fmt: skip


def trained(template: str, row: dict[str, Any], **options: Any) -> str:
    """The text of a row, in brackets what has a loss."""
    used = tokenizer(template)
    data = TextDataModule([row], tokenizer=used, **options)
    data.setup("fit")
    [batch] = data.train_dataloader()
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
    shown, before = "", False
    for token, label in zip(ids, labels, strict=True):
        shown += ("" if (label != -100) == before else "[[" if label != -100 else "]]") + used.decode([token])
        before = label != -100
    return shown + "]]" * before


START = "<|start|>system\nbe kind<|end|>\n<|start|>user\nthe film?<|end|>\n<|start|>assistant\n"
AGAIN = "<|start|>user\nand?<|end|>\n<|start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        (CHATML, {"messages": TWO_TURNS}, f"{START}[[\n\nwas good<|end|>\n]]{AGAIN}[[bad \n<|end|>\n]]"),
        (MARKED, {"messages": TWO_TURNS}, f"{START}[[\n\nwas good<|end|>]]\n{AGAIN}[[bad \n<|end|>]]\n"),
        (CHATML, {"prompt": TWO_TURNS[:2], "completion": [ANSWER]}, f"{START}[[\n\nwas good<|end|>\n]]"),
        (MARKED, {"prompt": TWO_TURNS[:4], "completion": TWO_TURNS[4:]},
         f"{START}\n\nwas good<|end|>\n{AGAIN}[[bad \n<|end|>]]\n"),
        (CHATML, {"prompt": TWO_TURNS[:4], "completion": "bad \n"},
         f"{START}\n\nwas good<|end|>\n{AGAIN}[[bad \n<|end|>\n]]"),
        (CHATML, {"prompt": "the film?", "completion": [turn("s", "be kind"), ANSWER]},
         f"{START}[[\n\nwas good<|end|>\n]]"),
        (CHATML, {"prompt": [*TWO_TURNS[:2], turn("a", "was")], "completion": " good"},
         f"{START}was[[ good<|end|>\n]]"),
        (MARKED, {"prompt": [*TWO_TURNS[:2], turn("a", "was")], "completion": " good"},
         f"{START}was[[ good<|end|>]]\n"),
        (CHATML, {"messages": [QUESTION, turn("a", "x"), turn("a", "y")]},
         "<|start|>user\nthe film?<|end|>\n<|start|>assistant\n[[x<|end|>\n]]<|start|>assistant\n[[y<|end|>\n]]"),
        (LAST_ONLY, {"messages": TWO_TURNS}, f"{START}[[\n\nwas good<|end|>\n]]{AGAIN}[[<think>\nbad \n<|end|>\n]]"),
        (MARKED, {"prompt": [turn("u", "the film? ")], "completion": [QUESTION, ANSWER]},
         "<|start|>user\nthe film?<|end|>\n<|start|>assistant\n[[\n\nwas good<|end|>]]\n"),
        (STRICT, {"messages": [QUESTION, ANSWER]}, "[user]the film?<|end|>[assistant][[was good<|end|>]]"),
        (CHATML, {"prompt": "the film", "completion": " was good"}, "the film[[ was good<|end|>]]"),
        (CHATML, {"prompt": "the film was ", "completion": "good"}, "the film was [[good<|end|>]]"),
        (CHATML, {"messages": [QUESTION], "text": "documents first"}, "[[documents first<|end|>]]"),
    ],
)  # fmt: skip
def test_loss_is_on_what_the_assistant_writes(template: str, row: dict[str, Any], expected: str) -> None:
    assert trained(template, row) == expected
    if "text" not in row:
        joined = expected.replace("[[", "").replace("]]", "")
        assert trained(template, row, train_on_prompts=True).replace("]]", "") == "[[" + joined


def test_a_marked_template_agrees_with_transformers() -> None:
    used, chat = tokenizer(MARKED), [turn("s", "be"), *[QUESTION, turn("a", "it was good")] * 2]
    data = TextDataModule([{"messages": chat}], tokenizer=used)
    data.setup("fit")
    found = used.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = data.train_rows[0].tolist()
    assert ids == found["input_ids"]
    assert [int(label != -100) for label in labels] == found["assistant_masks"]


def test_tokens_before_an_answer_are_those_of_the_prompt(tmp_path: Path) -> None:
    """As sampling sees them: no token reaches from the prompt into the answer."""
    used = tokenizer(CHATML)
    prompts = PromptDataModule([{"prompt": TWO_TURNS[:2]}], tokenizer=used)
    prompts.setup("fit")
    [batch] = prompts.train_dataloader()
    data = TextDataModule([{"prompt": TWO_TURNS[:2], "completion": [turn("a", "\nwas")]}], tokenizer=used)
    data.setup("fit")
    ids, labels = data.train_rows[0].tolist()
    assert ids[: labels.count(-100)] == batch.prompt_ids[0]
    assert used.decode(ids) == f"{START}\nwas<|end|>\n"


def test_a_token_across_the_start_of_a_completion() -> None:
    """Tokenised apart, "▁" would put a second space there."""
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate("▁ab")} | {"▁b": 3}, [("▁", "b")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options: dict[str, Any] = {"tokenizer": PreTrainedTokenizerFast(tokenizer_object=backend), "append_eos": False}
    options["tokenizer"].pad_token = "a"
    with pytest.raises(
        ValueError, match=r"row 1: a token reaches across the start of 'b'; begin it with the white space"
    ):
        TextDataModule([{"prompt": "a ", "completion": "b"}], **options).setup("fit")
    data = TextDataModule([{"prompt": "a", "completion": " b"}], **options)
    data.setup("fit")
    assert data.train_rows[0].tolist() == [[0, 1, 3], [-100, -100, 3]]


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (STRICT, {"messages": TWO_TURNS}, "refuses message 1 of 5 (role 'system'): System role not supported"),
        (STRICT, {"messages": [QUESTION, QUESTION, ANSWER]}, "refuses message 2 of 3 (role 'user'): must alternate"),
        (CHATML, {"messages": [QUESTION]}, "no turn of the assistant to train on"),
        (CHATML, {"messages": [ANSWER, QUESTION]}, "writes message 1 (by the assistant) cannot be told"),
        (REWRITES, {"messages": [QUESTION, turn("a", "think good"), *TWO_TURNS[3:]]}, "message 2 (by the assistant)"),
        (
            MARKED.replace("m.content", "m.content if loop.last else m.content.split('k')[-1]"),
            {"prompt": [QUESTION, turn("a", "think good")], "completion": TWO_TURNS[3:]},
            "writes the prompt cannot be",
        ),
    ],
)
def test_uncertain_rows_are_refused(template: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"messages": [QUESTION, ANSWER]} if "messages" in row else {"prompt": [QUESTION], "completion": [ANSWER]}
    data = TextDataModule(write_rows(tmp_path / "rows.jsonl", [good, row]), tokenizer=tokenizer(template))
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: ") as error:
        data.setup("fit")
    assert message in str(error.value)


def test_refused_chats_are_named_in_prompts_and_preferences(tmp_path: Path) -> None:
    rows = [
        {"prompt": [QUESTION], "chosen": "a", "rejected": "b"},
        {"prompt": TWO_TURNS[:2], "chosen": "a", "rejected": "b"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for data in (
        PromptDataModule(path, tokenizer=tokenizer(STRICT)),
        PreferenceDataModule(path, tokenizer=tokenizer(STRICT), prompt_column="prompt"),
    ):
        with pytest.raises(ValueError, match=r"rows.jsonl, line 2: .* message 1 of \d \(role 'system'\): System role"):
            data.setup("fit")


def test_options_of_the_template() -> None:
    """In prompts and preferences; ``CHATML`` reads ``thinks`` where it asks for an answer."""
    options: dict[str, Any] = {"tokenizer": tokenizer(CHATML), "chat_template_kwargs": {"thinks": True}}
    prompts = PromptDataModule([{"prompt": [QUESTION]}], **options)
    prompts.setup("fit")
    asked = "<|start|>user\nthe film?<|end|>\n<|start|>assistant\n"
    assert prompts.peek("train").prompts == [asked + "<think>\n"]  # type: ignore[union-attr]
    options["chat_template_kwargs"] = {"chat_template": STRICT}
    pairs = PreferenceDataModule([{"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, turn("a", "b")]}], **options)
    pairs.setup("fit")
    assert tokenizer(CHATML).decode(pairs.train_rows[0][0]) == "[user]the film?<|end|>[assistant]was good<|end|>"
    with pytest.warns(UserWarning, match="does not get the column 'tools'"):
        PromptDataModule([{"prompt": [QUESTION], "tools": [{}]}], **options).setup("fit")
    with pytest.warns(UserWarning, match="does not read 'thinsk'"):
        PromptDataModule([{"prompt": [QUESTION]}], **options | {"chat_template_kwargs": {"thinsk": 1}}).setup("fit")
    with pytest.raises(ValueError, match=r"\(chat_template_kwargs={'tokenize': True}\): tokenize is set by the use"):
        PromptDataModule([], chat_template_kwargs={"tokenize": True})


def test_a_last_message_by_the_assistant_goes_on() -> None:
    prompts = PromptDataModule([{"prompt": [QUESTION, turn("a", "It was")]}], tokenizer=tokenizer(CHATML))
    prompts.setup("fit")
    text = "<|start|>user\nthe film?<|end|>\n<|start|>assistant\nIt was"
    assert prompts.peek("train").prompts == [text]  # type: ignore[union-attr]


def test_long_chats_lose_their_end_and_packed_ones_nothing() -> None:
    rows = [{"messages": [QUESTION, turn("a", "x" * n)]} for n in (3, 30)] + [
        {"messages": [turn("u", "y" * 50), ANSWER]}
    ]
    data = TextDataModule(rows, tokenizer=tokenizer(CHATML), max_length=40)
    with (
        pytest.warns(UserWarning, match=r"max_length=40\): 2 of 3 rows are longer and lost their end"),
        pytest.warns(UserWarning, match="1 of 3 rows have no token with a loss among their first 40"),
    ):
        data.setup("fit")
    assert [(row.shape, (row[1] != -100).sum()) for row in data.train_rows] == [((2, 33), 5), ((2, 40), 12)]
    packed = TextDataModule(rows, tokenizer=tokenizer(CHATML), max_length=40, packing=True)
    packed.setup("fit")
    assert sum((row[1, 1:] != -100).sum() for row in packed.train_rows) == (3 + 2) + (30 + 2) + (8 + 2)


def test_append_eos_and_templates_that_end_otherwise() -> None:
    plain = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )
    assert (
        trained(plain, {"messages": [QUESTION, turn("a", "good")]}) == "user: the film?\nassistant: [[good\n<|end|>]]"
    )
    with pytest.warns(UserWarning, match="the model will not learn to stop"):
        trained(plain, {"messages": [QUESTION, turn("a", "good")]}, append_eos=False)
    assert trained(plain, {"prompt": "a", "completion": " b"}, append_eos=False) == "a[[ b]]"


WRITTEN = [
    json.dumps([QUESTION, ANSWER]),
    json.dumps([QUESTION], indent=1) + "\n",
    repr([QUESTION, ANSWER]),
    repr((QUESTION,)),
    f"[{QUESTION}\n {ANSWER}]",  # as numpy writes an array of messages, and pandas into a CSV file
    f"array([{QUESTION}], dtype=object)",
    json.dumps([{"tools": [], "content": "a", "role": "user"}]),
    json.dumps([{"from": "human", "value": "a"}]),
    json.dumps(QUESTION),
]


@pytest.mark.parametrize("text", WRITTEN)
def test_chats_written_as_text_are_refused(text: str) -> None:
    """They would be trained on as they stand there, brackets and all."""
    used = tokenizer(CHATML)
    rows = [{"prompt": "a", "text": "a", "completion": "a", "chosen": "ab", "rejected": "ac", "label": 1}] * 2
    for kind, column, options in (
        (PromptDataModule, "prompt", {}),
        (TextDataModule, "text", {}),
        (TextDataModule, "prompt", {"completion_column": "completion"}),
        (TextDataModule, "completion", {"completion_column": "completion"}),
        (PreferenceDataModule, "prompt", {}),
        (PreferenceDataModule, "rejected", {}),
        (PreferenceDataModule, "text", {"text_column": "text", "label_column": "label"}),
    ):
        data: Any = kind([rows[0], rows[1] | {column: text}], tokenizer=used, **options)  # type: ignore[arg-type]
        message = rf"row 2: column '{column}' holds chat messages written as text: .*; give lists of messages"
        with pytest.raises(ValueError, match=message):
            data.setup("fit")
    with pytest.raises(ValueError, match="prompt 1 is chat messages written as text; parse it first"):
        as_batch(["a", text], used)


def test_texts_about_chats_are_texts() -> None:
    texts = ["[user] {role: content}", "[{'role': 'a'}]", '[{"role": "a", "content": "b"}] is a chat', "{'n': 1}", "[{"]
    data = PromptDataModule(texts, tokenizer=tokenizer(CHATML), seed=0)
    data.setup("fit")
    assert data.peek("train", 9).prompts == texts  # type: ignore[union-attr]
