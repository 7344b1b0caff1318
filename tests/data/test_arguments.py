"""What the constructors of the data modules refuse."""

from typing import Any

import pytest

from lit_ppo.data.preferences import PreferenceDataModule
from lit_ppo.data.prompts import PromptDataModule
from lit_ppo.data.text import TextDataModule

LABELLED = {"text_column": "t", "label_column": "y"}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (PromptDataModule, {"batch_size": 0}, "(batch_size=0): must be an integer, at least 1"),
        (PromptDataModule, {"seed": -1}, "(seed=-1): must be an integer, at least 0"),
        (PromptDataModule, {"val_fraction": 1}, "(val_fraction=1): must be a finite number, at least 0 and below 1"),
        (PromptDataModule, {"val_fraction": 0.1, "val_path": "v"}, "(val_path='v'): val_fraction=0.1 is given too"),
        (PromptDataModule, {"split_column": "id"}, "(split_column='id'): nothing is split; give a val_fraction"),
        (PromptDataModule, {"max_prompt_length": 1}, "(max_prompt_length=1): must be an integer, at least 2"),
        (TextDataModule, {"max_length": 1}, "(max_length=1): must be an integer, at least 2"),
        (TextDataModule, {"tokenizer_path": "k"}, "(tokenizer_path='k', tokenizer_vocab_size=None): give all or none"),
        (
            TextDataModule,
            {"tokenizer_path": "k", "tokenizer_vocab_size": 300, "tokenizer": "t"},
            "(tokenizer='t', tokenizer_path='k'): give at most one of",
        ),
        (PreferenceDataModule, {"max_length": 1}, "(max_length=1): must be an integer, at least 2"),
        (PreferenceDataModule, {"text_column": "t"}, "(text_column='t', label_column=None): give all or none of"),
        (PreferenceDataModule, LABELLED | {"text_column": []}, "(text_column=[]): must be a list of names"),
        (PreferenceDataModule, LABELLED | {"prompt_column": "p"}, "(prompt_column='p'): text_column is given"),
        (PreferenceDataModule, LABELLED | {"chosen_column": "a"}, "(chosen_column='a'): text_column is given"),
        (PreferenceDataModule, LABELLED | {"rejected_column": "b"}, "(rejected_column='b'): text_column is given"),
    ],
)
def test_arguments_are_checked_in_the_constructor(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"DataModule\(") as error:
        kind("rows.jsonl", **options)
    assert str(error.value).startswith(kind.__name__ + message)
