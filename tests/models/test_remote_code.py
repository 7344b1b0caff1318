"""Code that comes with a model runs only if ``trust_remote_code`` allows it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ppo import LitRewardModel, LitSFT
from lit_ppo.models.load import load_causal_lm, load_critic, load_tokenizer
from lit_ppo.rewards import RewardModel
from tests.helpers.tiny import make_causal_lm, make_reward_model
from tests.helpers.traps import with_code, with_pickle


def test_code_of_a_model_runs_only_where_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    actor = str(with_code(make_causal_lm(tmp_path / "lm"), "GPT2LMHeadModel"))
    reward = str(with_code(make_reward_model(tmp_path / "reward"), "GPT2ForSequenceClassification"))
    loads = {
        "actor": lambda: load_causal_lm("actor", actor, {}),
        "critic": lambda: load_critic("critic", actor, {}),
        "reward": lambda: RewardModel(reward).build(),
    }
    for load in loads.values():
        with pytest.raises(ValueError, match="trust_remote_code"):
            load()
    load_tokenizer("actor", actor)  # an ordinary one beside such a model
    assert not Path("sprung").exists()
    assert type(load_causal_lm("actor", actor, {"trust_remote_code": True})).__name__ == "OwnModel"
    assert Path("sprung").exists()


PICKLED: dict[str, Callable[[str], Any]] = {
    "actor": lambda path: load_causal_lm("LitPPO(actor", path, {}),
    "critic": lambda path: load_critic("LitPPO(critic", path, {}),
    "reward": lambda path: RewardModel(path).build(),
    "SFT": lambda path: LitSFT(path).configure_model(),
    "reward model": lambda path: LitRewardModel(path).configure_model(),
    "in another dtype": lambda path: load_causal_lm("LitPPO(actor", path, {}, torch.bfloat16),
}


@pytest.mark.parametrize("name", PICKLED)
def test_weights_in_a_pickle_with_code_are_refused_in_our_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Those of torch tell how to load them all the same."""
    monkeypatch.chdir(tmp_path)
    path = str(with_pickle(make_causal_lm(tmp_path / "lm")))
    with pytest.raises(
        ValueError, match=r"^\w+\(\w+='.*lm'\): .* loading them would run code; give .*safetensors"
    ) as it:
        PICKLED[name](path)
    assert "weights_only" not in str(it.value)
    assert not Path("sprung").exists()
    (tmp_path / "lm/pytorch_model.bin").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"^\w+\(\w+='.*lm'\): its weights .* are damaged"):
        PICKLED[name](path)
