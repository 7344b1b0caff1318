"""Text that a chat template has rendered gets no second beginning-of-text token, wherever it goes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lit_ppo import PreferenceDataModule, PromptDataModule, RewardModel, TextDataModule
from lit_ppo.special_tokens import without_repeats
from tests.helpers.tiny import make_reward_model, make_tokenizer

CHAT = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "was good"}]
TOKENIZER = make_tokenizer(bos=True, chat=True)
RENDERED = str(TOKENIZER.apply_chat_template(CHAT, tokenize=False))
IDS = TOKENIZER.apply_chat_template(CHAT, tokenize=True)["input_ids"]  # what transformers gives


def first_row(data: Any) -> Any:
    data.setup("fit")
    return data.train_rows[0]


DATA: dict[str, Callable[[str], Any]] = {
    "text": lambda path: first_row(TextDataModule(path, text_column="a", tokenizer=TOKENIZER)).tolist(),
    "pairs": lambda path: first_row(
        PreferenceDataModule(path, chosen_column="a", rejected_column="b", tokenizer=TOKENIZER)
    )[0],
    "labels": lambda path: first_row(
        PreferenceDataModule(path, text_column="a", label_column="label", tokenizer=TOKENIZER)
    )[0],
}


@pytest.mark.parametrize("read", DATA.values(), ids=DATA)
def test_data(tmp_path: Path, read: Callable[[str], Any]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"a": RENDERED, "b": RENDERED + "bad", "label": 1}))
    assert RENDERED.startswith("[BOS]")
    assert read(str(tmp_path / "rows.jsonl")) == IDS


def test_prompts(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "[BOS] user it [EOS] assistant"}))
    data = PromptDataModule(str(tmp_path / "rows.jsonl"), tokenizer=TOKENIZER)
    data.setup("fit")
    ids = data.peek("train").prompt_ids[0]
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["[BOS]", "user", "it", "[EOS]", "assistant"]


@pytest.mark.parametrize("aggregation", ["last", "mean"])
def test_scores(tmp_path: Path, aggregation: Any) -> None:
    path = make_reward_model(tmp_path, "llama", tokenizer=TOKENIZER)
    stock = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        hidden = stock.model(torch.tensor([IDS])).last_hidden_state
        scores = stock.score(hidden)[0, :, 0]
    start = RENDERED.index("assistant")
    expected = (
        scores[-1]
        if aggregation == "last"
        else scores[IDS.index(TOKENIZER.convert_tokens_to_ids("assistant")) :].mean()
    )
    model = RewardModel(str(path), aggregation=aggregation)
    assert model.score_texts([RENDERED], [(start, len(RENDERED))]).item() == pytest.approx(expected.item(), rel=1e-5)


class Script:
    """A tokenizer that drops all but the given characters, and adds 7 at both ends."""

    def __init__(self, known: str) -> None:
        self.known = known

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = [self.known.index(c) for c in text if c in self.known]
        return {"input_ids": [7, *ids, 7] if add_special_tokens else ids}


@pytest.mark.parametrize(("known", "kept"), [("1", slice(1, 4)), ("\u3042", slice(1, 4)), ("\u0e01", slice(0, 5))])
def test_tokenizers_that_drop_latin_letters(known: str, kept: slice) -> None:
    """Where no text says what is added, all tokens stay."""
    assert without_repeats(Script(known), [[7, 7, 0, 7, 7]]) == [kept]
