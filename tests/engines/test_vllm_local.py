"""The colocated mode, with a vLLM that only notes what it is asked."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lit_ppo import VLLMEngine
from lit_ppo.engines import vllm_local
from tests.helpers.engines import CopyEngine
from tests.helpers.toys import make_data, make_module, make_trainer

PROMPTS = ["the film", "a story was"]


class FakeLLM:
    """vLLM's class as far as it is used; samples with a copy of the model."""

    made: list["FakeLLM"] = []
    path = ""

    def __init__(self, folder: str, **options: Any) -> None:
        assert Path(folder, "config.json").is_file()
        self.options, self.calls = options, []
        self.engine = CopyEngine(self.path)
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
        FakeLLM.made.append(self)

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> None:
        self.calls.append(method)
        if method == "lit_ppo_load":
            self.engine.model.load_state_dict(dict(args[0]), strict=False)

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {tags[0]}")

    def generate(self, prompts: Any, fields: Any, use_tqdm: bool) -> list[Any]:
        self.calls.append("generate")
        answers = []
        for prompt, given in zip(prompts, fields, strict=True):
            config = make_config(given)
            [ids], [logprobs] = self.engine.generate([prompt["prompt_token_ids"]], 1, config, [given["seed"]])
            steps = [{token: SimpleNamespace(logprob=x)} for token, x in zip(ids, logprobs, strict=True)]
            answers.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=steps)]))
        return answers


def make_config(given: dict[str, Any]) -> Any:
    from lit_ppo.generation.config import neutral

    return neutral(
        max_new_tokens=given["max_tokens"], temperature=given["temperature"], eos_token_id=given["stop_token_ids"],
        pad_token_id=0,
    )  # fmt: skip


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, lm: Path) -> type[FakeLLM]:
    module: Any = ModuleType("vllm")
    FakeLLM.path, FakeLLM.made = str(lm), []
    module.LLM, module.SamplingParams = FakeLLM, dict
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_local, "find_spec", lambda name: object())
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return FakeLLM


def test_colocated_run(vllm: type[FakeLLM], lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same samples as from a copy of the model; on a GPU it sleeps during updates and gets weights each time."""
    engine = VLLMEngine(mode="colocate", dtype="float32", max_model_len=40, gpu_memory_utilization=0.3)
    module = make_module(lm, engine=engine)
    make_trainer(tmp_path, max_steps=1).fit(module, make_data(tmp_path))
    found = module.rollout(PROMPTS, stream="x")
    copy = CopyEngine(str(lm))
    plain = make_module(lm, engine=copy)
    with torch.no_grad():
        plain.models.actor.load_state_dict(module.actor.state_dict())
    assert found.responses == plain.rollout(PROMPTS, stream="x").responses
    [llm] = vllm.made
    assert (llm.options["dtype"], llm.options["max_model_len"]) == ("float32", 40)
    assert llm.options["gpu_memory_utilization"] == 0.3
    assert (llm.options["load_format"], llm.options["logprobs_mode"]) == ("dummy", "processed_logprobs")
    assert "distributed_executor_backend" not in llm.options
    ways = ["lit_ppo_start", "lit_ppo_load", "lit_ppo_finish", "reset_prefix_cache", "generate"]
    assert llm.calls[-5:] == ways
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine.local.sleep()  # type: ignore[union-attr]
    monkeypatch.setattr(vllm_local, "parts", lambda weights, largest, dtype, device: iter([dict(weights)]))
    engine.wake()
    engine.sync(iter([]))
    engine.generate([[3]], 1, module.generation, [7])
    engine.sleep()
    engine.sleep()
    assert llm.calls[-7:] == [
        "wake weights", "lit_ppo_start", "lit_ppo_load", "lit_ppo_finish", "reset_prefix_cache", "wake kv_cache",
        "generate", "sleep 2",
    ][-7:]  # fmt: skip


def test_refused(vllm: type[FakeLLM], lm: Path, monkeypatch: pytest.MonkeyPatch):
    module = make_module(lm, engine=VLLMEngine(mode="colocate", tensor_parallel_size=2))
    with pytest.raises(ValueError, match=r"VLLMEngine\(tensor_parallel_size=2\): must divide the 1 ranks"):
        module.rollout(PROMPTS)
    monkeypatch.setattr(vllm_local, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"VLLMEngine\(mode='colocate'\): needs vLLM; pip install 'lit-ppo\[vllm\]'"):
        VLLMEngine(mode="colocate")
