"""The trained tokenizer: reversible, reproducible, loadable beside a model of any family."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from lit_ppo.data.preferences import PreferenceDataModule
from lit_ppo.data.prompts import PromptDataModule
from lit_ppo.data.text import TextDataModule
from lit_ppo.data.tokenization import gives_the_same_ids, loads_the_same, save_tokenizer, train_tokenizer
from lit_ppo.supervised.reward_model import LitRewardModel
from lit_ppo.supervised.sft import LitSFT
from tests.helpers.tiny import FAMILIES, WORDS, make_causal_lm, make_config, make_reward_model, make_tokenizer
from tests.helpers.toys import make_module, make_trainer

TEXTS = ["the film was good", " the film was really bad", "the plot, the cast : naïve \u2014 and 2,000 good films"] * 3


def test_decoding_gives_back_the_text_with_one_leading_space(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300, tmp_path)
    unseen = "Zwölf 日本 \t tabs,  two spaces .\nnew line"
    for text in (*TEXTS, unseen):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == " " + text.removeprefix(" ")
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["clean_up_tokenization_spaces"] is False  # transformers 4 takes silence for yes


def test_words_have_one_token_anywhere_and_nothing_is_added(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 320, tmp_path)
    first, middle = tokenizer("film the")["input_ids"], tokenizer("the film the")["input_ids"]
    assert first == middle[1:]
    assert len(middle) == 3
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|endoftext|>")
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, *middle}) == 4
    assert tokenizer.padding_side == "right"


def test_vocabulary_size_is_reached_exactly_and_matters(tmp_path: Path) -> None:
    small, large = train_tokenizer(TEXTS, 262, tmp_path / "a"), train_tokenizer(TEXTS, 290, tmp_path / "b")
    assert (len(small), len(large)) == (262, 290)
    assert len(large(TEXTS[0])["input_ids"]) < len(small(TEXTS[0])["input_ids"])


def test_merges_are_the_most_frequent_pairs(tmp_path: Path) -> None:
    """By hand: in 3 x 'abab' + 2 x 'cd' (each with its space), the pair 'ab' occurs 6 times, the most; then 'abab'."""
    tokenizer = train_tokenizer(["abab", "abab", "abab", "cd", "cd"], 260, tmp_path)
    assert tokenizer.convert_ids_to_tokens([258]) == ["ab"]
    assert tokenizer.convert_ids_to_tokens([259])[0] in ("abab", "Ġab")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_replaces_the_tokenizer_is_noticed(tmp_path: Path, family: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 300, tmp_path)
    config = make_config(family, tokenizer)
    config.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    unchanged = family != "qwen2"
    assert (loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]) == unchanged
    assert loads_the_same(tokenizer, config) == unchanged
    if unchanged:
        ids = tokenizer(TEXTS)["input_ids"]
        assert loaded.batch_decode(ids) == tokenizer.batch_decode(ids)
        assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_saved_alike_however_it_was_loaded(tmp_path: Path) -> None:
    """transformers adds the last two to a tokenizer's own settings."""
    train_tokenizer(["a fine film"], 258, tmp_path / "trained")
    for name, local_files_only in (("hub", False), ("offline", True)):
        loaded = AutoTokenizer.from_pretrained(tmp_path / "trained", local_files_only=local_files_only)
        save_tokenizer(loaded, tmp_path / name)
    one, other = ((tmp_path / name / "tokenizer_config.json").read_text() for name in ("hub", "offline"))
    assert one == other
    assert json.loads(one).keys() & {"pad_token", "is_local", "local_files_only"} == {"pad_token"}


def test_tokenizers_are_compared_by_their_ids(tmp_path: Path) -> None:
    """Folders, tokens to pad with and a first token that is added may differ."""
    own = make_tokenizer(tmp_path / "own")
    padded = make_tokenizer()
    padded.add_special_tokens({"pad_token": "[other]"})
    closing = make_tokenizer()
    closing.pad_token = closing.eos_token
    for same in (own, AutoTokenizer.from_pretrained(tmp_path / "own"), padded, closing, make_tokenizer(chat=True)):
        assert gives_the_same_ids(same, own)
        assert gives_the_same_ids(own, same)
    merged = train_tokenizer(TEXTS, 300, tmp_path / "trained")
    split = AutoTokenizer.from_pretrained(tmp_path / "trained")
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    larger = make_tokenizer()
    larger.add_tokens(["<think>"])
    for one, other in ((make_tokenizer(words=WORDS[::-1]), own), (merged, own), (larger, own), (split, merged)):
        assert not gives_the_same_ids(one, other)
        assert not gives_the_same_ids(other, one)


@pytest.mark.parametrize("kind", [PromptDataModule, TextDataModule, PreferenceDataModule])
def test_data_in_other_ids_than_the_models_are_refused(tmp_path: Path, kind: Any) -> None:
    """By words that the model has, too: nothing else would notice."""
    make_tokenizer(tmp_path / "other", words=[*WORDS[::-1], "user", "assistant"])
    rows = [{"prompt": "the film", "text": "the film was", "chosen": "good", "rejected": "bad"}] * 4
    module: Any = {
        PromptDataModule: lambda: make_module(make_causal_lm(tmp_path / "model"), minibatch_size=4),
        TextDataModule: lambda: LitSFT(str(make_causal_lm(tmp_path / "model"))),
        PreferenceDataModule: lambda: LitRewardModel(str(make_reward_model(tmp_path / "model"))),
    }[kind]()
    given = kind(rows, tokenizer=str(tmp_path / "other"), batch_size=4)
    message = rf"^{kind.__name__}\(tokenizer='.*other'\): gives other ids than the tokenizer of {type(module).__name__}"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, max_steps=1).fit(module, given)


@pytest.mark.parametrize(
    ("texts", "size", "says"),
    [
        (TEXTS, 257, r"vocab_size=257\): must be an integer, at least 258"),
        ([], 300, r"texts\): there is no text"),
        (["", ""], 300, r"texts\): there is no text"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path: Path, texts: list[str], size: int, says: str) -> None:
    with pytest.raises(ValueError, match=r"^train_tokenizer\(" + says):
        train_tokenizer(texts, size, tmp_path)
    assert not list(tmp_path.iterdir())
