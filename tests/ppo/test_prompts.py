"""What people hold as prompts: every form of the same prompts gives the same responses, and nothing else is taken."""

import re
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, default_collate
from transformers import BatchEncoding

from tests.helpers.tiny import make_causal_lm, make_tokenizer
from tests.helpers.toys import make_module, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:")

TEXTS = ["the film", "a movie was very"]
ROWS = [{"prompt": text, "answer": number} for number, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def module(tiny_lm):
    return make_module(tiny_lm, temperature=0.5)


def tokens(module: Any, side: str) -> BatchEncoding:
    return module.tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")


@pytest.mark.parametrize(
    ("form", "columns"),
    [
        (lambda m: tuple(TEXTS), {}),
        (lambda m: {"prompt": TEXTS}, {}),
        (lambda m: ROWS, {"answer": [0, 1]}),
        (lambda m: default_collate(ROWS), {"answer": [0, 1]}),
        (lambda m: tokens(m, "left"), {}),
        (lambda m: {**tokens(m, "right"), "answer": ["x", "y"]}, {"answer": ["x", "y"]}),
        (lambda m: {"input_ids": m.tokenizer(TEXTS).input_ids}, {}),
        (lambda m: [{"input_ids": m.tokenizer(text).input_ids, "answer": 3} for text in TEXTS], {"answer": [3, 3]}),
    ],
)
def test_every_form_is_the_same_prompts(module: Any, form: Any, columns: dict[str, list[Any]]) -> None:
    experience, plain = module.rollout(form(module), stream="a"), module.rollout(TEXTS, stream="a")
    assert experience.prompts == TEXTS
    assert {name: values for name, values in experience.columns.items() if name != "token_type_ids"} == columns
    assert experience.prompt_ids.tolist() == plain.prompt_ids.tolist()
    assert experience.response_ids.tolist() == plain.response_ids.tolist()


def test_torchs_collation_of_chats_and_of_nested_columns_is_undone(tmp_path: Any) -> None:
    actor = make_causal_lm(tmp_path, tokenizer=make_tokenizer(chat=True))
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "it"}] for text in TEXTS]
    rows = [{"prompt": chat, "truth": {"answer": i, "style": "x"}} for i, chat in enumerate(chats)]
    experience = make_module(actor).rollout(default_collate(rows))
    assert experience.columns == {"messages": chats, "truth": [row["truth"] for row in rows]}


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("the film", "is one prompt"),
        ([{"role": "user", "content": "a"}], "is one chat prompt"),
        ({"text": TEXTS, "id": [1, 2]}, "'text', 'id'): has no column of prompts"),
        ([{"text": "a"}], "'text'): has no column of prompts"),
        ({"query": TEXTS, "labels": torch.ones(2, 3)}, "'query', 'labels'"),
        ({"prompt": TEXTS, "input_ids": [[1], [2]]}, "both prompts and their tokens"),
        ({"prompt": "the film"}, "'prompt' is str, not one value per prompt"),
        ({"prompt": TEXTS, "answer": [1]}, "'answer' has 1 values for 2 prompts"),
        ({"prompt": TEXTS, "messages": TEXTS}, "chat prompts go to the reward as 'messages'; rename the column"),
        ([{"prompt": "a"}, {"answer": 1}], "row 1 has no 'prompt'"),
        ([1, 2], "prompt 0 is neither text nor"),
        ([TEXTS[0], None], "prompt 1 is neither text nor"),
        ([torch.ones(2, 3, dtype=torch.long)], "prompt 0 is neither text nor"),
        (torch.ones(2, 3, dtype=torch.long), "tensor of shape (2, 3)): has no mask"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.long)}, "there is padding, but no 'attention_mask'"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "the mask is not one 0 or 1 per token"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "prompt 0 has no token"),
        ({"input_ids": [[1, 99_999]]}, "prompt 0 has an id outside"),
    ],
)
def test_anything_else_is_refused_with_its_keys(module: Any, prompts: Any, words: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^rollout\(prompts=.*{re.escape(words)}.*; give strings, lists of chat mess"
    ):
        module.rollout(prompts)


def test_a_plain_loader_of_rows_trains_on_their_prompts(tiny_lm: Any, tmp_path: Any) -> None:
    """As people coming from TRL write it: the reward gets prompts, completions and the other columns by name."""
    seen: list[Any] = []

    def reward(completions: list[str], answer: list[int], prompts: list[str]) -> list[float]:
        seen.append((prompts, answer, len(completions)))
        return [0.0] * len(completions)

    module = make_module(tiny_lm, rewards=reward, minibatch_size=2)
    make_trainer(tmp_path, max_steps=1).fit(module, DataLoader(ROWS, batch_size=2), DataLoader(ROWS, batch_size=2))
    assert len(seen) > 1  # validation and one update
    assert all(call == (TEXTS, [0, 1], 2) for call in seen)


def test_a_column_that_a_reward_needs_is_missed_before_the_first_rollout(tiny_lm: Any, tmp_path: Any) -> None:
    module = make_module(tiny_lm, rewards=lambda completions, ground_truth: [0.0] * len(completions), minibatch_size=2)
    message = r"needs ground_truth; there are prompts, responses \(or completions\), answer"
    with pytest.raises(TypeError, match=message):
        make_trainer(tmp_path, limit_val_batches=0).fit(module, *[DataLoader(ROWS, batch_size=2)] * 2)
    assert module.rollouts == 0


def test_a_column_with_the_name_of_a_text_is_refused_before_the_first_rollout(tiny_lm: Any, tmp_path: Any) -> None:
    rows = [{"prompt": text, "completions": "gold"} for text in TEXTS]
    module = make_module(
        tiny_lm, rewards=lambda responses, completions: [float(c == "gold") for c in completions], minibatch_size=2
    )
    with pytest.raises(TypeError, match=r"the data have a column 'completions', .* rename the column$"):
        make_trainer(tmp_path, limit_val_batches=0).fit(module, *[DataLoader(rows, batch_size=2)] * 2)
    assert module.rollouts == 0
