"""Values as text: the same in every process."""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from lit_ppo.data.prompts import PromptDataModule
from lit_ppo.digest import as_json, unit_hash
from tests.helpers.tiny import make_tokenizer


class Film:
    """Its text has its address."""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b", "a", "c"}, '["a", "b", "c"]'),
        ({"x": [frozenset([(2, "b"), (1, "c")])]}, '{"x": [[[1, "c"], [2, "b"]]]}'),
        ({frozenset("ba"), frozenset("ca")}, '[["a", "b"], ["a", "c"]]'),
        ({2: "b", "a": {None: {"d", "c"}}}, '{"\\"a\\"": {"null": ["c", "d"]}, "2": "b"}'),
        (np.arange(3), "[0, 1, 2]"),
        (np.int64(12), "12"),
        (torch.tensor([1.5]), "[1.5]"),
        ({"b": "é", "a": None}, '{"a": null, "b": "\\u00e9"}'),
        (b"x", "\"b'x'\""),
    ],
)
def test_values_by_hand(value: Any, text: str) -> None:
    assert as_json(value) == text


def test_long_arrays_are_complete_and_addresses_left_out() -> None:
    changed = np.arange(5000)
    changed[2500] = 0
    assert as_json(changed) != as_json(np.arange(5000))
    assert as_json([Film()]) == as_json([Film()])


def test_sets_of_text_are_the_same_in_every_process() -> None:
    """Their own order comes from the seed of Python's hashes."""
    words = "s = set('film plot music actor scene'.split())"
    code = f"from lit_ppo.digest import *; {words}; print(as_json(s), unit_hash([s]))"
    found = set()
    for seed in ("1", "2", "3"):
        done = [sys.executable, "-c", code]
        found.add(
            subprocess.run(done, env=os.environ | {"PYTHONHASHSEED": seed}, check=True, capture_output=True).stdout
        )
    assert len(found) == 1
    assert json.loads(found.pop().decode().partition("]")[0] + "]") == ["actor", "film", "music", "plot", "scene"]


def test_a_data_module_takes_them() -> None:
    """A set in a column, in two orders, and names of two types."""
    found = set()
    for tags in ([8, 0], [0, 8]):
        rows = [{"prompt": "the film", "tags": set(tags), "names": {1: "a", "b": 2}}]
        data = PromptDataModule(rows, tokenizer=make_tokenizer(), seed=0)
        data.setup("fit")
        assert repr(rows[0]["tags"]) == repr(set(tags))
        found.add(data.state_dict()["fingerprint"])
    assert len(found) == 1
    assert unit_hash([{8, 0}]) == unit_hash([{0, 8}])
