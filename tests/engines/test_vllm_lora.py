"""An adapter as a request: the server gets it alone, against a server that applies it by peft's own code."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ppo import VLLMEngine
from lit_ppo.engines.vllm_worker import WeightReceiver
from tests.helpers.fake_vllm import FakeVLLM
from tests.helpers.toys import make_data, make_module, make_trainer

pytest.importorskip("peft")
PROMPTS = ["the film", "a story was", "it"]
LORA = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"}


@pytest.fixture
def server(lm: Path, tmp_path: Path) -> Iterator[FakeVLLM]:
    fake = FakeVLLM(lm)
    fake.folder = tmp_path
    yield fake
    if not fake.dead:
        fake.stop()


def module_of(server: FakeVLLM, lm: Path, **arguments: Any) -> Any:
    engine = VLLMEngine(
        mode="server", address=server.address, weights="lora", timeout=20, restart_timeout=arguments.pop("patience", 0)
    )
    return make_module(lm, engine=engine, **{"actor_lora": LORA, **arguments})


def test_the_adapter_alone_is_sent_and_applied(server: FakeVLLM, lm: Path, tmp_path: Path):
    """After updates at a large rate the server's log-probs are those of training."""
    module = module_of(server, lm, actor_optimizer=lambda params: torch.optim.SGD(params, lr=5.0))
    make_trainer(tmp_path).fit(module, make_data(tmp_path))
    found = module.rollout(PROMPTS, samples_per_prompt=2)
    torch.testing.assert_close(found.sampling_logprobs, found.logprobs, rtol=1e-4, atol=1e-4)
    assert (found.logprobs - found.ref_logprobs).abs().max() > 0.01
    assert "/v1/load_lora_adapter" in server.calls
    assert not [call for call in server.calls if call.startswith(("lit_ppo_load", "lit_ppo_start"))]
    assert server.requests[-1]["model"] == "lit_ppo"
    loads = [i for i, call in enumerate(server.calls) if call == "lit_ppo_note"]
    assert all("/reset_prefix_cache" in server.calls[i : i + 2] for i in loads)


def test_a_server_that_has_lost_the_adapter_gets_it_again(server: FakeVLLM, lm: Path):
    module = module_of(server, lm)
    with torch.no_grad():
        for name, parameter in module.models.actor.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    expected = module.rollout(PROMPTS, stream="x")
    server.adapters.clear()
    server.version = None
    again = module.rollout(PROMPTS, stream="x")
    assert again.responses == expected.responses
    torch.testing.assert_close(again.sampling_logprobs, again.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"lora_rank": 0}, "takes no adapter of rank 2; start it with: .*--enable-lora --max-lora-rank 8"),
        ({"lora_rank": 1}, "takes no adapter of rank 2"),
        ({"lora_updates": False}, "takes no adapter of rank 2; start it with: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ({"is_trained": True}, "the weights of its model were replaced by another run; start it"),
    ],
)
def test_servers_that_are_refused(server: FakeVLLM, lm: Path, said: dict[str, Any], problem: str):
    server.said = said
    with pytest.raises(ValueError, match=rf"VLLMEngine\(address='{server.address}'\): {problem}"):
        module_of(server, lm).rollout(PROMPTS)


def test_without_an_adapter_it_is_refused(server: FakeVLLM, lm: Path):
    with pytest.raises(ValueError, match=r"VLLMEngine\(weights='lora'\): the actor has no adapter; give .* actor_lora"):
        module_of(server, lm, actor_lora=None).rollout(PROMPTS)
    with pytest.raises(ValueError, match=r"VLLMEngine\(weights='lora'\): .*mode='server'"):
        VLLMEngine(mode="colocate", weights="lora")


def test_the_server_keeps_one_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    worker = WeightReceiver()
    first, second = (Path(worker.lit_ppo_write_adapter(name, "{}", "AAAA")) for name in ("one", "two"))
    assert not first.exists()
    assert (second / "adapter_config.json").read_text() == "{}"
    assert (second / "adapter_model.safetensors").read_bytes() == bytes(3)
