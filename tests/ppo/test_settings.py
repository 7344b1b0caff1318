"""What LitPPO's arguments pass on to the loaders."""

import json
from pathlib import Path

import pytest

from tests.helpers.toys import make_module


def test_code_of_a_tokenizer_runs_only_where_asked_for(tmp_path: Path, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    folder = tmp_path / "tokenizer"
    make_module(tiny_lm).tokenizer.save_pretrained(folder)
    code = "import transformers\nclass OwnTokenizer(transformers.PreTrainedTokenizerFast):\n    pass\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | own))
    with pytest.raises(ValueError, match=r"LitPPO\(tokenizer=.*trust_remote_code"):
        _ = make_module(tiny_lm, tokenizer=str(folder)).tokenizer
    trusting = make_module(tiny_lm, tokenizer=str(folder), model_kwargs={"trust_remote_code": True})
    assert type(trusting.tokenizer).__name__ == "OwnTokenizer"
