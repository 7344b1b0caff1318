"""Code that comes with a model runs only if ``trust_remote_code`` allows it."""

import json
from pathlib import Path

import pytest

from lit_ppo.models.load import load_causal_lm, load_critic, load_tokenizer
from lit_ppo.rewards import RewardModel
from tests.helpers.tiny import make_causal_lm, make_reward_model


def with_code(folder: Path, kind: str) -> Path:
    """Lets the model's config, and its tokenizer's, point at a class in the folder itself."""
    (folder / "own.py").write_text(
        "from pathlib import Path\nimport transformers\nPath(__file__).parent, Path('sprung').touch()\n"
        f"class OwnConfig(transformers.GPT2Config):\n    model_type = 'own'\n"
        f"class OwnModel(transformers.{kind}):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoModel": "own.OwnModel"}
    auto["AutoModelForSequenceClassification"] = "own.OwnModel"
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    return folder


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
