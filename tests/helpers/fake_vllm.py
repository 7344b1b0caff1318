"""A server that answers as vLLM 0.32 does, for one tiny model; it can refuse, die and come back."""

import base64
import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file
from transformers import GenerationConfig

from lit_ppo.generation.transformers import generate
from lit_ppo.models.load import load_causal_lm


class FakeVLLM:
    """Serves the model in ``path`` at ``address`` until :meth:`stop`.

    Args:
        path: Folder of the model.
        **described: In place of what ``lit_ppo_describe`` would say.
    """

    def __init__(self, path: Path, *, port: int = 0, **described: Any) -> None:
        self.path, self.said = path, described
        self.calls: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.refuse: dict[str, tuple[int, str]] = {}  # method or path -> status, message
        self.stop_after = -1  # completions after which the server dies
        self.reads_files = True
        self.longest = 64  # response
        self.folder: Path | None = None  # for adapters
        self.lock = threading.Lock()
        self.port = port
        self.start()

    def start(self) -> None:
        """From the checkpoint, without the weights that it has got."""
        self.model = load_causal_lm("server", str(self.path), {}).eval()
        self.version: str | None = None
        self.adapters: set[str] = set()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                self.answer(json.loads(self.rfile.read(length) or "null"))

            def answer(self, body: Any) -> None:
                status, found = owner.answer(self.path, body)
                if status == 0:  # it has died
                    self.close_connection = True
                    self.connection.close()
                    return
                text = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None: ...

        self.dead = False
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.dead = True
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if self.dead:
            return 0, None
        name = body["method"] if path == "/collective_rpc" else path
        with self.lock:
            self.calls.append(name)
            if name in self.refuse:
                status, message = self.refuse[name]
                return status, {"error": {"message": message}}
            if path == "/health":
                return 200, None
            if path == "/v1/models":
                return 200, {"data": [{"id": "tiny"}]}
            if path == "/reset_prefix_cache":
                return 200, {"success": True}
            if path == "/v1/load_lora_adapter":
                self.adapt(Path(body["lora_path"]))
                self.adapters.add(body["lora_name"])
                return 200, "Success: LoRA adapter added successfully."
            if path == "/collective_rpc":
                return 200, {"results": [self.rpc(name, *body["args"])]}
            if path == "/v1/completions":
                if self.stop_after == 0:
                    threading.Thread(target=self.stop).start()
                    self.dead = True
                    return 0, None
                self.stop_after -= 1
                if body["model"] not in {"", "tiny", *self.adapters}:
                    return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
                self.requests.append(body)
                return 200, {"choices": [self.complete(body)]}
        return 404, {"detail": "Not Found"}

    def rpc(self, method: str, *args: Any) -> Any:
        config = self.model.config
        if method == "lit_ppo_describe":
            shape = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
            about = {
                "vllm": "0.32.0", "dtype": "float32", "logprobs_mode": "processed_logprobs", "max_model_len": 64,
                "transfer": None, "shape": shape, "version": self.version, "lora_rank": 8, "lora_updates": True,
                "is_trained": False,
            }  # fmt: skip
            return about | self.said
        if method == "lit_ppo_can_read":
            return str(self.reads_files and Path(args[0]).is_file())
        if method in ("lit_ppo_load_file", "lit_ppo_load_bytes"):
            part = load_file(args[0]) if method == "lit_ppo_load_file" else load(base64.b64decode(args[0]))
            self.model.load_state_dict(part, strict=False)
        if method == "lit_ppo_write_adapter":
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            (folder / "adapter_config.json").write_text(args[1])
            (folder / "adapter_model.safetensors").write_bytes(base64.b64decode(args[2]))
            return str(folder)
        if method in ("lit_ppo_finish", "lit_ppo_note"):
            self.version = args[0]
        return None

    def adapt(self, folder: Path) -> None:
        """Put the adapter of a folder into the model of the checkpoint."""
        from peft import LoraConfig, inject_adapter_in_model

        self.model = load_causal_lm("server", str(self.path), {})
        inject_adapter_in_model(LoraConfig.from_pretrained(folder), self.model)
        saved = load_file(folder / "adapter_model.safetensors")
        named = {
            name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): saved[name] for name in saved
        }
        assert not self.model.load_state_dict(named, strict=False).unexpected_keys
        self.model.eval()

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        config = GenerationConfig(
            max_new_tokens=min(body["max_tokens"], self.longest), temperature=body["temperature"] or 1.0,
            do_sample=True, top_k=0, eos_token_id=body["stop_token_ids"] or None, pad_token_id=0,
        )  # fmt: skip
        ids = torch.tensor([body["prompt"]])
        seeds = [(body["seed"] % 2**32, body["seed"] >> 32)] if "seed" in body else None
        sampled = generate(self.model, ids, torch.ones_like(ids, dtype=torch.bool), config, seeds, logprobs=True)
        reason = "stop" if sampled.ended[0] else "length"
        return {
            "token_ids": sampled.ids[0],
            "logprobs": {"token_logprobs": sampled.logprobs[0]},
            "finish_reason": reason,
        }
