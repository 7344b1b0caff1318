"""A real vLLM server for tests, from an environment of its own."""

import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("LIT_PPO_VLLM_PYTHON", "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """Variables for vLLM on a small CPU machine."""
    return {
        **os.environ, "VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip


def run_in_environment(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run the python that has vLLM."""
    command = [PYTHON, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900, check=False)


class VLLMServer:
    """Serves a model until the end of the ``with`` block.

    Args:
        model: Its folder.
        log: File for what it prints.
        *options: Further ones of ``vllm serve``.
    """

    def __init__(self, model: Path, log: Path, *options: str, python: str = PYTHON) -> None:
        self.model, self.log, self.options, self.python = model, log, options, python
        self.port = free_port()
        self.process: subprocess.Popen[Any] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model),
            "--port", str(self.port),
            "--host", "127.0.0.1", "--enforce-eager", "--max-model-len", "48", "--dtype", "float32",
            "--logprobs-mode", "processed_logprobs",
            "--worker-extension-cls", "lit_ppo.engines.vllm_worker.WeightReceiver", *self.options,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True)

    def kill(self) -> None:
        """As by a power cut, with all that it started."""
        if self.process is not None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None

    def wait(self, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return
            except OSError:
                time.sleep(1.0)
        raise TimeoutError(self.log.read_text()[-3000:])

    def __enter__(self) -> "VLLMServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
