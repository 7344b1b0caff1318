"""Sampling with vLLM: a server, on this machine or others, or inside the training processes."""

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import GenerationConfig

from lit_ppo.constructor import constructor
from lit_ppo.engines.base import Engine, Sampled
from lit_ppo.engines.vllm_local import LocalModel
from lit_ppo.engines.vllm_server import Servers
from lit_ppo.generation.config import stop_ids
from lit_ppo.validate import integer, integer_or_none, number, one_of, refuse

Mode = Literal["server", "colocate"]
Transfer = Literal["auto", "nccl", "shared_memory", "http", "lora"]

ADDRESS = re.compile(r"http://[\w.-]{1,253}(:[0-9]{1,5})?/?", re.ASCII)

# Arguments of one mode, with what the other mode has in their place.
OF_SERVER = ("address", "weights", "timeout", "restart_timeout", "max_concurrency")
OF_COLOCATE = {
    "tensor_parallel_size": "--tensor-parallel-size",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "dtype": "--dtype",
    "max_model_len": "--max-model-len",
}
# Fields of transformers.GenerationConfig that both sides know, and their neutral values there.
SAMPLING: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
READ = {*SAMPLING, "max_new_tokens", "min_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "temperature"}
IGNORED = {"do_sample", "transformers_version", "_from_model_config"}


class VLLMEngine(Engine):
    """Samples with vLLM 0.32 or newer: many times the tokens per second on GPUs, at small differences in log-probs.

    Apply ``--config vllm``, which corrects for these differences with ``ImportanceCorrection``.

    Args:
        mode: ``"server"``: one or more servers, started with ``vllm serve`` on other GPUs, on this machine or others.
            ``"colocate"``: vLLM in the training processes, on the same GPUs; it sleeps during updates.
        address: Of the server, such as ``http://localhost:8000``, or a list of them. Server mode only.
        weights: How weights get to the server: ``"nccl"`` (between GPUs; needs vLLM in this environment),
            ``"shared_memory"`` (files in memory on the same machine), ``"http"``, or ``"auto"``, the first that works;
            ``"lora"``: the adapter of ``actor_lora`` alone, over HTTP, which the server applies. Server mode only.
        timeout: Seconds that a response may take. By default 600. Server mode only.
        restart_timeout: Seconds to wait for a server that does not answer; then the run ends, and can be resumed. By
            default 300. Server mode only.
        max_concurrency: Requests at a time of each rank, per server. By default 256. Server mode only.
        tensor_parallel_size: Ranks that share a copy of the model. By default 1. Colocated only.
        gpu_memory_utilization: Fraction of GPU memory that vLLM may use while it samples. By default 0.4. Colocated
            only.
        dtype: Of the weights that sample, such as ``bfloat16``. By default that of the checkpoint. Colocated only.
        max_model_len: Longest prompt and response together. By default the model's. Colocated only.
    """

    name = "vllm"

    @constructor
    def __init__(
        self,
        mode: Mode,
        *,
        address: str | list[str] | None = None,
        weights: Transfer | None = None,
        timeout: float | None = None,
        restart_timeout: float | None = None,
        max_concurrency: int | None = None,
        tensor_parallel_size: int | None = None,
        gpu_memory_utilization: float | None = None,
        dtype: str | None = None,
        max_model_len: int | None = None,
    ) -> None:
        one_of(self, "mode", mode, get_args(Mode))
        given = {name: value for name, value in locals().items() if name in (*OF_SERVER, *OF_COLOCATE)}
        self._refuse_of_other_mode(mode, given)
        self.server: Servers | None = None
        self.local: LocalModel | None = None
        self.overlaps, self.adapter = mode == "server", weights == "lora"
        if self.overlaps:
            self.server = Servers(
                self._addresses(address),
                one_of(self, "weights", _or(weights, "auto"), get_args(Transfer)),
                timeout=number(self, "timeout", _or(timeout, 600.0), above=0),
                patience=number(self, "restart_timeout", _or(restart_timeout, 300.0), at_least=0),
                concurrency=integer(self, "max_concurrency", _or(max_concurrency, 256)),
            )
            return
        self.local = LocalModel(
            integer(self, "tensor_parallel_size", _or(tensor_parallel_size, 1)),
            number(self, "gpu_memory_utilization", _or(gpu_memory_utilization, 0.4), above=0, at_most=1),
            one_of(self, "dtype", _or(dtype, "auto"), ("auto", "bfloat16", "float16", "float32")),
            integer_or_none(self, "max_model_len", max_model_len),
        )
        self.every_rank = True  # type: ignore[misc]
        self.ranks_per_copy = self.local.tensor_parallel_size

    def check(self, model: Any, config: GenerationConfig) -> None:
        sampling_fields(config)
        if self.server is not None:
            self.server.check(model, config)
        else:
            assert self.local is not None
            self.local.load(model)

    def generate(
        self, prompt_ids: list[list[int]], n: int, config: GenerationConfig, seeds: list[int] | None
    ) -> Sampled:
        fields = sampling_fields(config)
        if seeds is None:  # greedy
            fields |= {"temperature": 0.0}
        rows = [(ids, fields if seeds is None else fields | {"seed": seeds[i * n + k]})
                for i, ids in enumerate(prompt_ids) for k in range(n)]  # fmt: skip
        answers = (self.server or self.local).generate(rows)  # type: ignore[union-attr]
        return [ids for ids, _ in answers], [logprobs for _, logprobs in answers]

    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        (self.server or self.local).sync(weights)  # type: ignore[union-attr]

    def sleep(self) -> None:
        if self.local is not None:
            self.local.sleep()

    def wake(self) -> None:
        if self.local is not None:
            self.local.wake()

    def _refuse_of_other_mode(self, mode: str, given: dict[str, Any]) -> None:
        for name in OF_SERVER if mode == "colocate" else OF_COLOCATE:
            if given[name] is None:
                continue
            advice = "there is no server; leave it out, or use mode='server'"
            if mode == "server":
                advice = f"with mode='server' the server decides: vllm serve ... {OF_COLOCATE[name]}; leave it out"
            refuse(self, name, given[name], advice)

    def _addresses(self, address: Any) -> list[str]:
        if address is None:
            refuse(self, "address", None, "mode='server' needs the server's, such as http://localhost:8000")
        given = list(address) if isinstance(address, list | tuple) else [address]
        urls = [url.rstrip("/") for url in given if isinstance(url, str) and ADDRESS.fullmatch(url)]
        if not urls or len(set(urls)) < len(given):
            refuse(self, "address", address, "must be http://HOST:PORT, or a list of them, all different")
        return urls


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def sampling_fields(config: GenerationConfig) -> dict[str, Any]:
    """VLLM's names and values for the user's generation settings.

    The model's own stop tokens are ignored in favour of those of the run.

    Raises:
        ValueError: vLLM has no such setting.
    """
    neutral = GenerationConfig().to_dict()
    for name, value in config.to_dict().items():
        if name not in READ | IGNORED and value != neutral.get(name):
            refuse("LitPPO", f"generation.{name}", value, "VLLMEngine has no such setting; leave it out")
    fields = {name: default if (x := getattr(config, name)) is None else x for name, default in SAMPLING.items()}
    return {
        **fields,
        "temperature": config.temperature,
        "max_tokens": config.max_new_tokens,
        "min_tokens": config.min_new_tokens or 0,
        "stop_token_ids": stop_ids(config),
        "ignore_eos": True,
    }
