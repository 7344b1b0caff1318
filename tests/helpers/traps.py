"""Files that run code when they are loaded without care: it makes the file ``sprung`` in the working directory."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SPRING = "from pathlib import Path; Path('sprung').touch()"


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, (SPRING,)


def with_pickle(folder: Path) -> Path:
    """Puts the weights of a model into a pickle, beside a trap."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "trap": Trap()}, folder / "pytorch_model.bin")
    return folder


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
