"""Shared fixtures: tiny checkpoints made once a session."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.cli_toys import CONFIG
from tests.helpers.tiny import make_causal_lm, make_reward_model

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # tiny tensors: threads only cost, and parallel workers share the cores


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2-like causal LM with a word tokenizer."""
    return make_causal_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="session")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_lm``, with larger weights: its predictions are far from uniform."""
    return make_causal_lm(tmp_path_factory.mktemp("sharp"), scale=4.0)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-like causal LM with a word tokenizer."""
    return make_causal_lm(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def tiny_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2-like sequence classifier with one label."""
    return make_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of eight steps of a toy, for tests of the command."""
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


# The longest files, longest first: they start first, so that no worker is left alone with one of them.
LONG = (
    "parallel/test_equivalence.py",
    "parallel/test_elastic.py",
    "parallel/test_sharding.py",
    "callbacks/test_monitors.py",
    "run/test_killed.py",
    "models/test_lora.py",
    "callbacks/test_going_back.py",
    "test_knobs.py",
    "callbacks/test_contract.py",
    "test_configs.py",
    "quickstart/test_run.py",
    "test_recipes.py",
    "test_tutorials.py",
    "ppo/test_module.py",
    "test_benchmarks.py",
    "cli/test_stages.py",
    "ppo/test_bf16_mixed.py",
    "golden/test_golden.py",
    "cli/test_ppo.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a file stay on one worker, in the order above: what their fixtures build is built once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log) if config.getoption("dist") == "load" else None
