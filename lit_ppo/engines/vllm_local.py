"""vLLM inside the training processes, on the same GPUs."""

import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lit_ppo.engines.vllm_transfer import parts
from lit_ppo.parallel.ranks import n_ranks

PART = 2**29  # bytes of weights that are copied at once


class LocalModel:
    """A copy of the actor in vLLM on each rank, or shared by some ranks, that sleeps during updates.

    Args:
        tensor_parallel_size: Ranks that share a copy.
        gpu_memory_utilization: Fraction of GPU memory that it may use while it is awake.
        dtype: Of its weights, or ``"auto"``.
        max_model_len: Longest prompt and response together; None: the model's.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(
        self, tensor_parallel_size: int, gpu_memory_utilization: float, dtype: str, max_model_len: int | None
    ) -> None:
        if find_spec("vllm") is None:
            raise ImportError("VLLMEngine(mode='colocate'): needs vLLM; pip install 'lit-ppo[vllm]', or use a server")
        self.tensor_parallel_size, self.gpu_memory_utilization = tensor_parallel_size, gpu_memory_utilization
        self.dtype, self.max_model_len = dtype, max_model_len
        self.llm: Any = None
        self._awake: set[str] = {"weights", "kv_cache"}

    def load(self, model: Any) -> None:
        """Build the model from its configuration; its weights come with :meth:`sync`.

        Raises:
            ValueError: Ranks cannot be divided into copies.
        """
        if n_ranks() % self.tensor_parallel_size:
            raise ValueError(
                f"VLLMEngine(tensor_parallel_size={self.tensor_parallel_size}): must divide the {n_ranks()} ranks"
            )
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process: weights need no copy
        from vllm import LLM

        options: dict[str, Any] = {"max_model_len": self.max_model_len} if self.max_model_len else {}
        if self.tensor_parallel_size > 1:
            options["distributed_executor_backend"] = "external_launcher"
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            self.llm = LLM(
                folder, load_format="dummy", skip_tokenizer_init=True, generation_config="vllm", seed=0,
                dtype=self.dtype, tensor_parallel_size=self.tensor_parallel_size,
                gpu_memory_utilization=self.gpu_memory_utilization, enable_sleep_mode=torch.cuda.is_available(),
                logprobs_mode="processed_logprobs",
                worker_extension_cls="lit_ppo.engines.vllm_worker.WeightReceiver", **options,
            )  # fmt: skip
        self.sleep()

    def generate(self, rows: Sequence[tuple[list[int], dict[str, Any]]]) -> list[tuple[list[int], list[float]]]:
        """One response to each row.

        Args:
            rows: Prompt and sampling fields of each.
        """
        from vllm import SamplingParams

        self._wake("kv_cache")
        prompts = [{"prompt_token_ids": ids} for ids, _ in rows]
        fields = [SamplingParams(logprobs=0, detokenize=False, **given) for _, given in rows]
        outputs = [answer.outputs[0] for answer in self.llm.generate(prompts, fields, use_tqdm=False)]
        return [(list(output.token_ids), _logprobs(output)) for output in outputs]

    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Copy the weights."""
        dtype = self.llm.llm_engine.model_config.dtype
        self.llm.collective_rpc("lit_ppo_start")
        for part in parts(weights, PART, dtype, device="cuda" if torch.cuda.is_available() else "cpu"):
            self.llm.collective_rpc("lit_ppo_load", args=(list(part.items()),))
        self.llm.collective_rpc("lit_ppo_finish", args=(uuid.uuid4().hex,))
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Free weights and cache."""
        if torch.cuda.is_available() and self._awake:
            self.llm.sleep(level=2)
            self._awake = set()

    def wake(self) -> None:
        """Make room for the weights; the room for the cache comes when they are there."""
        self._wake("weights")

    def _wake(self, tag: str) -> None:
        if tag not in self._awake:
            self.llm.wake_up(tags=[tag])
            self._awake.add(tag)


def _logprobs(output: Any) -> list[float]:
    """Of the sampled tokens."""
    return [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
