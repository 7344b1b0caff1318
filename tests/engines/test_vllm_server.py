"""VLLMEngine over HTTP, against a server that answers as vLLM does."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import engines as engines_benchmark
from lit_ppo import VLLMEngine
from lit_ppo.engines import vllm_transfer
from tests.helpers.engines import CopyEngine
from tests.helpers.fake_vllm import FakeVLLM
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import make_data, make_module, make_trainer

PROMPTS = ["the film", "a story was", "it"]


@pytest.fixture
def server(lm: Path) -> Iterator[FakeVLLM]:
    fake = FakeVLLM(lm)
    yield fake
    if not fake.dead:
        fake.stop()


def engine(server: FakeVLLM, **arguments: Any) -> VLLMEngine:
    return VLLMEngine(mode="server", address=server.address, **{"restart_timeout": 0.0, "timeout": 20.0, **arguments})


def test_samples_are_those_of_the_seeds(server: FakeVLLM, lm: Path):
    """The same as from an engine without HTTP; each response is a request with a seed of its own."""
    module = make_module(lm, engine=engine(server), generation={"max_new_tokens": 6, "eos_token_id": [1, 9]})
    found = module.rollout(PROMPTS, samples_per_prompt=2)
    plain = make_module(lm, engine=CopyEngine(str(lm)), generation={"max_new_tokens": 6, "eos_token_id": [1, 9]})
    assert found.responses == plain.rollout(PROMPTS, samples_per_prompt=2).responses
    torch.testing.assert_close(found.sampling_logprobs, found.logprobs, rtol=1e-4, atol=1e-4)
    assert len({request["seed"] for request in server.requests}) == 6
    request = server.requests[0]
    assert request["stop_token_ids"] == [1, 9]
    assert request["ignore_eos"]
    assert (request["max_tokens"], request["min_tokens"], request["temperature"]) == (6, 0, 1.0)
    assert (request["top_k"], request["top_p"], request["min_p"], request["repetition_penalty"]) == (0, 1.0, 0.0, 1.0)


def test_sampling_fields_reach_the_server(server: FakeVLLM, lm: Path):
    fields = {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    given = {"max_new_tokens": 4, "min_new_tokens": 2, **fields}
    module = make_module(lm, engine=engine(server), generation=given, temperature=0.7)
    module.rollout(PROMPTS)
    request = server.requests[0]
    assert {name: request[name] for name in fields} == fields
    assert (request["min_tokens"], request["temperature"]) == (2, 0.7)
    module.rollout(PROMPTS, do_sample=False)
    assert server.requests[-1]["temperature"] == 0.0
    assert "seed" not in server.requests[-1]
    other = make_module(lm, engine=engine(server), generation={"max_new_tokens": 4, "no_repeat_ngram_size": 2})
    with pytest.raises(ValueError, match=r"LitPPO\(generation\.no_repeat_ngram_size=2\): VLLMEngine has no such"):
        other.rollout(PROMPTS)


@pytest.mark.parametrize("weights", ["auto", "shared_memory", "http"])
def test_trained_weights_arrive_in_parts(server: FakeVLLM, lm: Path, tmp_path: Path, weights: str, monkeypatch: Any):
    monkeypatch.setattr(vllm_transfer, "LARGEST", {"shared_memory": 3000, "http": 3000})
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(vllm_transfer, "MEMORY", memory)
    module = make_module(lm, engine=engine(server, weights=weights))
    make_trainer(tmp_path, max_steps=1).fit(module, make_data(tmp_path))
    module.rollout(PROMPTS)
    trained = module.actor.model.state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in server.model.state_dict().items())
    loads = [call for call in server.calls if call.startswith("lit_ppo_load")]
    assert set(loads) == {"lit_ppo_load_bytes" if weights == "http" else "lit_ppo_load_file"}
    assert len(loads) > 6
    starts = [i for i, call in enumerate(server.calls) if call == "lit_ppo_finish"]
    assert all("/reset_prefix_cache" in server.calls[i : i + 2] for i in starts)
    assert not list(memory.iterdir())


def test_a_server_elsewhere_gets_weights_over_http(server: FakeVLLM, lm: Path):
    server.reads_files = False
    make_module(lm, engine=engine(server)).rollout(PROMPTS)
    assert "lit_ppo_load_bytes" in server.calls
    with pytest.raises(ValueError, match=r"VLLMEngine\(weights='shared_memory'\): a server cannot read"):
        make_module(lm, engine=engine(server, weights="shared_memory")).rollout(PROMPTS)


def test_two_servers_share_the_requests(server: FakeVLLM, lm: Path):
    second = FakeVLLM(lm)
    both = VLLMEngine(mode="server", address=[server.address, second.address], restart_timeout=0.0)
    ways = both, CopyEngine(str(lm))
    found, expected = (make_module(lm, engine=way).rollout(PROMPTS, samples_per_prompt=2) for way in ways)
    assert found.responses == expected.responses
    assert (len(server.requests), len(second.requests)) == (3, 3)
    second.stop()


def restarting(server: FakeVLLM, seconds: float) -> threading.Thread:
    """Starts a dead server again, after some seconds."""

    def run() -> None:
        while not server.dead:
            time.sleep(0.01)
        time.sleep(seconds)
        server.stop_after = -1
        server.start()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_server_that_dies_is_waited_for(server: FakeVLLM, lm: Path):
    """It comes back without the weights and gets them again: the responses are those of an undisturbed rollout."""
    module = make_module(lm, engine=engine(server, restart_timeout=30.0))
    with torch.no_grad():
        next(iter(module.models.actor.parameters())).mul_(1.3)
    expected = module.rollout(PROMPTS, samples_per_prompt=3, stream="x").responses
    server.stop_after = 4
    thread = restarting(server, 0.7)
    assert module.rollout(PROMPTS, samples_per_prompt=3, stream="x").responses == expected
    thread.join()
    assert server.calls.count("lit_ppo_finish") == 2


def test_a_server_that_was_started_again_between_requests_is_noticed(server: FakeVLLM, lm: Path):
    module = make_module(lm, engine=engine(server, restart_timeout=30.0))
    with torch.no_grad():
        next(iter(module.models.actor.parameters())).mul_(1.3)
    expected = module.rollout(PROMPTS, stream="x").responses
    server.stop()
    server.start()
    assert module.rollout(PROMPTS, stream="x").responses == expected


def test_a_run_ends_when_the_server_does_not_come_back(server: FakeVLLM, lm: Path, caplog: Any):
    module = make_module(lm, engine=engine(server, restart_timeout=0.2))
    module.rollout(PROMPTS)
    server.stop()
    caplog.set_level("INFO", logger="lightning.pytorch")
    with pytest.raises(RuntimeError, match=r"no server answered for 0.2 s \(restart_timeout\); start one with"):
        module.rollout(PROMPTS)
    waits = [record.message for record in caplog.records if "waiting for the server" in record.message]
    assert waits == [f"VLLMEngine(address='{server.address}'): waiting for the server, up to 0.2 s (restart_timeout)"]


def test_a_response_that_the_server_cuts_is_refused(server: FakeVLLM, lm: Path):
    """vLLM lowers the number of new tokens without a word where prompt and response are too long for it."""
    server.longest = 3
    with pytest.raises(RuntimeError, match=r"ended a response after 3 tokens, since .* --max-model-len"):
        make_module(lm, engine=engine(server)).rollout(PROMPTS)


@pytest.mark.parametrize("method", ["lit_ppo_load_file", "lit_ppo_start", "/v1/completions"])
def test_a_refusal_ends_the_run_with_the_message_of_the_server(server: FakeVLLM, lm: Path, method: str):
    server.refuse[method] = (500, "no room for it")
    module = make_module(lm, engine=engine(server))
    with pytest.raises(RuntimeError, match=r"VLLMEngine\(address='http.*was refused \(500\): no room for it"):
        module.rollout(PROMPTS)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"vllm": "0.31.2"}, "runs vLLM 0.31.2; use 0.32 or newer"),
        ({"shape": {"hidden_size": 999}}, "serves a model with hidden_size=999, the actor has 16"),
        ({"logprobs_mode": "raw_logprobs"}, "start it with --logprobs-mode processed_logprobs"),
        ({"max_model_len": 10}, "max_new_tokens is 10; start it with a larger --max-model-len"),
    ],
)
def test_preflight_checks_the_server(lm: Path, tmp_path: Path, said: dict[str, Any], problem: str):
    fake = FakeVLLM(lm, **said)
    module = make_module(lm, engine=engine(fake))
    with pytest.raises(ValueError, match=rf"VLLMEngine\(address='{fake.address}'\): .*{problem}"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path))
    assert module.rollouts == 0
    fake.stop()


def test_preflight_says_how_to_start_the_server(server: FakeVLLM, lm: Path, tmp_path: Path):
    server.refuse["lit_ppo_describe"] = (500, "no method")
    with pytest.raises(ValueError, match=r"cannot take weights .*no method.*--worker-extension-cls lit_ppo.engines"):
        make_trainer(tmp_path).fit(make_module(lm, engine=engine(server)), make_data(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"mode": "remote"}, r"VLLMEngine\(mode='remote'\): must be one of"),
        ({"mode": "server"}, r"VLLMEngine\(address=None\): mode='server' needs"),
        ({"mode": "server", "address": "localhost:8000"}, r"address='localhost:8000'\): must be http://HOST:PORT"),
        ({"mode": "server", "address": "https://a:1"}, r"must be http://HOST:PORT"),
        ({"mode": "server", "address": ["http://a:1", "http://a:1/"]}, r"all different"),
        (
            {"mode": "server", "address": "http://a:1", "tensor_parallel_size": 4},
            r"mode='server' the server decides: .*--tensor",
        ),
        ({"mode": "server", "address": "http://a:1", "weights": "ftp"}, r"VLLMEngine\(weights='ftp'\)"),
        ({"mode": "server", "address": "http://a:1", "timeout": 0}, r"VLLMEngine\(timeout=0\)"),
        ({"mode": "server", "address": "http://a:1", "restart_timeout": -1}, r"VLLMEngine\(restart_timeout=-1\)"),
        ({"mode": "server", "address": "http://a:1", "max_concurrency": -1}, r"VLLMEngine\(max_concurrency=-1\)"),
        ({"mode": "colocate", "address": "http://a:1"}, r"VLLMEngine\(address='http://a:1'\): .*mode='server'"),
        ({"mode": "colocate", "gpu_memory_utilization": 1.5}, r"VLLMEngine\(gpu_memory_utilization=1.5\)"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        VLLMEngine(**arguments)


def test_a_model_of_another_size_is_refused(lm: Path, tmp_path: Path):
    fake = FakeVLLM(make_causal_lm(tmp_path / "other", n_embd=32))
    with pytest.raises(ValueError, match=r"hidden_size=32, the actor has 16; serve the actor"):
        make_module(lm, engine=engine(fake)).rollout(PROMPTS)
    fake.stop()


def test_benchmark_compares_engines(server: FakeVLLM, lm: Path, capsys: Any):
    rows = engines_benchmark.main(
        ["--model", str(lm), "--address", server.address, "--rows", "2", "--repeats", "1", "--max_new_tokens", "4"]
    )
    assert [(row["engine"], row["rows"]) for row in rows] == [("default", 2), ("vllm", 2)]
    assert len(server.requests) == 4  # warm-up and one repetition
    assert all(row["best"] > 0 for row in rows)
    assert "tokens/s" in capsys.readouterr().out


def test_benchmark_compares_rollouts_ahead(server: FakeVLLM, lm: Path, capsys: Any):
    [row] = engines_benchmark.main(
        ["--model", str(lm), "--address", server.address, "--rows", "4", "--repeats", "1", "--max_new_tokens", "4",
         "--updates", "2"]
    )  # fmt: skip
    assert row["rows"] == 4
    assert row["without"] > 0
    assert row["ahead"] > 0
    assert "times as fast" in capsys.readouterr().out
