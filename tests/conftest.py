"""Shared fixtures: tiny checkpoints made once a session."""

import os
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny import make_causal_lm, make_reward_model

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # tiny tensors: threads only cost, and parallel workers share the cores


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2-like causal LM with a word tokenizer."""
    return make_causal_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-like causal LM with a word tokenizer."""
    return make_causal_lm(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def tiny_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2-like sequence classifier with one label."""
    return make_reward_model(tmp_path_factory.mktemp("reward"))
