"""What runs inside a vLLM server's workers; start it with ``vllm serve --worker-extension-cls`` and this class.

It imports nothing of lit-ppo and needs none of its dependencies: in the server's environment this file's package only
has to be found, by ``pip install --no-deps lit-ppo`` or ``PYTHONPATH``.
"""

import base64
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file


class WeightReceiver:
    """Takes a model's weights in several parts, by vLLM's own reloading, which shards and converts them."""

    vllm_config: Any
    model_runner: Any

    def lit_ppo_describe(self) -> dict[str, Any]:
        """What the trainer checks before it sends anything."""
        import vllm
        from vllm import envs

        config = self.vllm_config.model_config
        text = config.hf_config.get_text_config()
        transfer, lora = self.vllm_config.weight_transfer_config, self.vllm_config.lora_config
        return {
            "vllm": vllm.__version__,
            "dtype": str(config.dtype).removeprefix("torch."),
            "architectures": list(config.hf_config.architectures or []),
            "logprobs_mode": config.logprobs_mode,
            "max_model_len": config.max_model_len,
            "transfer": None if transfer is None else transfer.backend,
            "shape": {name: getattr(text, name, None) for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
            "version": getattr(self, "lit_ppo_version", None),
            "lora_rank": 0 if lora is None else lora.max_lora_rank,
            "lora_updates": bool(envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING),
            "is_trained": hasattr(self, "lit_ppo_active"),
        }

    def lit_ppo_can_read(self, path: str) -> bool:
        """Whether a file of the trainer's is in reach."""
        return Path(path).is_file()

    def lit_ppo_write_adapter(self, version: str, config: str, data: str) -> str:
        """Write an adapter to a folder of this machine, and delete the one before.

        Args:
            version: Of the weights.
            config: Text of ``adapter_config.json``.
            data: Base64 text of a safetensors file.

        Returns:
            The folder.
        """
        before: Path | None = getattr(self, "lit_ppo_adapter", None)
        folder = Path(tempfile.gettempdir(), f"lit_ppo_adapter_{version}_{os.getpid()}")
        folder.mkdir(mode=0o700)
        (folder / "adapter_config.json").write_text(config)
        (folder / "adapter_model.safetensors").write_bytes(base64.b64decode(data))
        self.lit_ppo_adapter = folder
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
        return str(folder)

    def lit_ppo_start(self) -> None:
        """Begin to take weights; a half-done beginning of a trainer that died is dropped."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.lit_ppo_version: str | None = None
        if getattr(self, "lit_ppo_active", False):
            self._lit_ppo_finalize()
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())
        self.lit_ppo_active = True

    def lit_ppo_load_file(self, path: str) -> None:
        """Take some weights from a safetensors file."""
        self.lit_ppo_load(load_file(path).items())

    def lit_ppo_load_bytes(self, data: str) -> None:
        """Take some weights from the base64 text of a safetensors file."""
        self.lit_ppo_load(load(base64.b64decode(data)).items())

    def lit_ppo_load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take some weights."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(weights)

    def lit_ppo_finish(self, version: str) -> None:
        """Use the new weights.

        Args:
            version: Of these weights; a server that was started again has none.
        """
        self._lit_ppo_finalize()
        self.lit_ppo_version = version

    def lit_ppo_note(self, version: str) -> None:
        """Note the version of weights that came another way."""
        self.lit_ppo_version = version

    def _lit_ppo_finalize(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(model, self.vllm_config.model_config)
            for layer in model.modules():
                # on CPUs a head that is tied to the embeddings has a packed copy, which vLLM 0.32 leaves as it was
                if hasattr(layer, "cpu_linear") and getattr(layer, "weight", torch.empty(0)).numel():
                    layer.quant_method.process_weights_after_loading(layer)
        self.model_runner.reset_lora_state()
        self.lit_ppo_active = False
