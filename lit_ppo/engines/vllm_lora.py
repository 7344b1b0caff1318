"""A LoRA adapter as a request to vLLM servers: the adapter is sent alone, and the server applies it to its model."""

import base64
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from lit_ppo.validate import refuse

ADAPTER = "lit_ppo"  # its name in the server
START = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_SERVER_DEV_MODE=1 vllm serve BASE --enable-lora --max-lora-rank {}"


class Adapter:
    """Sends the adapter of a model to servers of its base model.

    Args:
        model: Hugging Face model with an adapter.

    Raises:
        ValueError: It has none.
    """

    def __init__(self, model: Any) -> None:
        found = getattr(model, "peft_config", {}).get("default")
        if found is None:
            problem = "the actor has no adapter; give LitPPO an actor_lora, or leave weights out"
            refuse("VLLMEngine", "weights", "lora", problem)
        self.rank = max([found.r, *found.rank_pattern.values()])
        with tempfile.TemporaryDirectory() as folder:
            found.save_pretrained(folder)
            self._config = Path(folder, "adapter_config.json").read_text()

    def check(self, where: str, described: dict[str, Any]) -> None:
        """Check that a server can take the adapter.

        Args:
            where: Names the server.
            described: What it says about itself.

        Raises:
            ValueError: It cannot.
        """
        problem = None
        if not described["lora_updates"] or described["lora_rank"] < self.rank:
            problem = f"takes no adapter of rank {self.rank}"
        elif described["is_trained"]:
            problem = "the weights of its model were replaced by another run"
        if problem is not None:
            raise ValueError(f"{where}: {problem}; start it with: {START.format(max(self.rank, 8))}")

    def send(self, servers: list[Any], weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        """Send the adapter; each version has a name of its own, since vLLM would use what it has cached of the last."""
        data = base64.b64encode(save({name: x.float().cpu().contiguous() for name, x in weights})).decode()
        for server in servers:
            path = server.rpc("lit_ppo_write_adapter", version, self._config, data)
            server.call("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": path, "load_inplace": True})
            server.rpc("lit_ppo_note", version)


def is_gone(status: int, text: str) -> bool:
    """Whether an answer says that a server does not know the adapter, which it has lost in a restart."""
    if status != 404:
        return False
    try:
        return ADAPTER in str(json.loads(text))
    except ValueError:
        return False
