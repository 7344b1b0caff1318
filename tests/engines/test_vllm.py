"""VLLMEngine against a real vLLM; see environment.sh beside this file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lit_ppo import VLLMEngine
from lit_ppo.callbacks import ImportanceCorrection
from lit_ppo.data.tokenization import train_tokenizer
from lit_ppo.engines.vllm_server import Server
from tests.helpers.ranks import on_ranks
from tests.helpers.spies import Spy
from tests.helpers.tiny import WORDS, make_causal_lm
from tests.helpers.toys import logged, make_data, make_module, make_trainer
from tests.helpers.vllm_jobs import SLOW, fit_sharded
from tests.helpers.vllm_servers import PYTHON, VLLMServer, run_in_environment

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="LIT_PPO_VLLM_PYTHON names no python with vLLM"),
]
PROMPTS = ["the film", "a story was", "it", "we saw the very long movie"]
SIZE = {"hidden_size": 128, "intermediate_size": 64, "scale": 3.0}  # heads of 64: vLLM has no smaller ones on CPUs


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def server(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer, more = None, {}
    if request.param == "qwen2":  # transformers reads only its own kind of tokenizer with it
        more = {"tie_word_embeddings": True}
        train_tokenizer([" ".join(WORDS)] * 3, 300, folder / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = make_causal_lm(folder / "model", request.param, tokenizer=tokenizer, **SIZE, **more)
    with VLLMServer(model, folder / "log") as running:
        running.wait()
        yield running


def engine(server: VLLMServer, **arguments: Any) -> VLLMEngine:
    return VLLMEngine(mode="server", address=server.address, **arguments)


def assert_alike(experience: Any) -> None:
    """Two programs with the same weights: log-probs of the sampled tokens differ by rounding."""
    mask = experience.response_mask
    torch.testing.assert_close(experience.sampling_logprobs[mask], experience.logprobs[mask], rtol=0, atol=2e-3)


def test_a_run_learns_and_log_probs_agree(server: VLLMServer, tmp_path: Path):
    """Weights change by much between updates, and the server has those of the update."""
    seen: list[Any] = []
    module = make_module(server.model, engine=engine(server), samples_per_prompt=2, **SLOW)
    watch = Spy("on_update_end", lambda module, experience: seen.append(experience))
    trainer = make_trainer(tmp_path, max_steps=3, callbacks=[watch])
    trainer.fit(module, make_data(tmp_path))
    for experience in seen:
        assert_alike(experience)
    assert all(row["rollout/sampling_logprob_difference"] < 2e-3 for row in logged(trainer))
    moved = [(a - b).abs().max() for a, b in zip(seen[0].logprobs[:, :1], seen[2].logprobs[:, :1], strict=False)]
    assert max(moved) > 0.01


@pytest.mark.parametrize("weights", ["shared_memory", "http"])
def test_samples_are_the_same_twice(server: VLLMServer, weights: str):
    """The same seeds, another order of requests: the same tokens; both ways of weights bring the same ones."""
    generation = {"max_new_tokens": 8, "eos_token_id": [1, 7, 9]}
    first, second = (
        make_module(server.model, engine=engine(server, **given), generation=generation).rollout(
            PROMPTS, samples_per_prompt=4
        )
        for given in ({"weights": weights}, {"max_concurrency": 2})
    )
    assert first.responses == second.responses
    assert_alike(first)
    stops = {int(row[n - 1]) for row, n in zip(first.response_ids, first.response_mask.sum(1), strict=True)}
    assert stops & {1, 7, 9}


def test_lora(server: VLLMServer):
    pytest.importorskip("peft")
    module = make_module(server.model, engine=engine(server), actor_lora={"r": 2, "target_modules": "all-linear"})
    with torch.no_grad():
        for name, parameter in module.models.actor.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    experience = module.rollout(PROMPTS, samples_per_prompt=4)
    assert_alike(experience)
    assert (experience.logprobs - experience.ref_logprobs).abs().max() > 0.1


def test_filters_and_greedy(server: VLLMServer):
    """Log-probs under a filter are those of the filtered distribution; greedy is transformers' greedy."""
    module = make_module(server.model, engine=engine(server), temperature=0.7)
    assert_alike(module.rollout(PROMPTS))
    filtered = make_module(server.model, engine=engine(server), generation={"max_new_tokens": 8, "top_k": 1})
    only = filtered.rollout(PROMPTS)
    assert only.sampling_logprobs.abs().max() < 1e-3  # one token is left
    plain = make_module(server.model)
    assert module.rollout(PROMPTS, do_sample=False).responses == plain.rollout(PROMPTS, do_sample=False).responses


def test_two_ranks_with_shards(server: VLLMServer, tmp_path: Path):
    """FSDP2: weights are gathered one by one; every rank sees all rows."""
    if "qwen2" in str(server.model):
        pytest.skip("one family is enough")
    on_ranks(2, fit_sharded, str(server.model), server.address, str(tmp_path), folder=tmp_path)


def test_a_response_that_the_server_would_cut_ends_the_run(server: VLLMServer):
    module = make_module(server.model, engine=engine(server), generation={"max_new_tokens": 46})
    with pytest.raises(RuntimeError, match=r"ended a response after \d+ tokens, since .* --max-model-len"):
        module.rollout(["the film was"], samples_per_prompt=16)


def test_a_killed_server(server: VLLMServer):
    """It is started again in the middle of the rollout, from the checkpoint, and gets the weights of the run."""
    module = make_module(server.model, engine=engine(server), generation={"max_new_tokens": 24})
    with torch.no_grad():
        next(iter(module.models.actor.parameters())).mul_(1.3)
    expected = module.rollout(PROMPTS, samples_per_prompt=16, stream="x")
    sample, sampler = module.sampler.engine.server.generate, module.sampler.engine.server
    kills = []

    def killed(rows: Any) -> Any:
        if not kills:
            kills.append(True)
            server.kill()
            server.start()
        return sample(rows)

    sampler.generate = killed
    again = module.rollout(PROMPTS, samples_per_prompt=16, stream="x")
    assert kills
    assert again.responses == expected.responses
    assert_alike(again)


def test_a_trainer_that_died_while_it_sent_weights(server: VLLMServer):
    """What it left behind in the server is dropped by the next one."""
    before = Server(server.address, 60.0)
    before.rpc("lit_ppo_start")
    before.close()
    assert_alike(make_module(server.model, engine=engine(server)).rollout(PROMPTS))


def test_an_adapter_as_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The server applies the adapter to its own weights; also after it was killed and started again."""
    pytest.importorskip("peft")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    model = make_causal_lm(tmp_path / "model", "llama", **SIZE)
    lora = {"r": 4, "target_modules": "all-linear", "use_rslora": True}
    with VLLMServer(model, tmp_path / "log", "--enable-lora", "--max-lora-rank", "8") as server:
        server.wait()
        way = engine(server, weights="lora")
        module = make_module(model, engine=way, actor_lora=lora, actor_optimizer=steep, samples_per_prompt=2, **SLOW)
        seen: list[Any] = []
        watch = Spy("on_update_end", lambda module, experience: seen.append(experience))
        trainer = make_trainer(tmp_path, max_steps=3, callbacks=[watch])
        trainer.fit(module, make_data(tmp_path))
        for experience in seen:
            assert_alike(experience)
        assert (seen[-1].logprobs - seen[-1].ref_logprobs).abs().max() > 0.05
        server.kill()
        server.start()
        assert_alike(module.rollout(PROMPTS))


def steep(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=3.0)


def by_length(responses: list[str]) -> list[float]:
    """Moves the weights in each update, whatever the tokens of the model are."""
    return [len(text) / 20 for text in responses]


def test_samples_ahead_are_the_same_twice(server: VLLMServer, tmp_path: Path):
    """The server samples in a thread while the actor trains; the weights it has do not depend on the clock."""
    runs: list[list[Any]] = [[], []]
    for seen in runs:
        watch = Spy("on_update_end", lambda module, experience, seen=seen: seen.append(experience))
        module = make_module(server.model, engine=engine(server), rollout_ahead=1, rewards=by_length, **SLOW)
        trainer = make_trainer(tmp_path, max_steps=3, callbacks=[ImportanceCorrection(), watch])
        trainer.fit(module, make_data(tmp_path))
    assert [e.responses for e in runs[0]] == [e.responses for e in runs[1]]
    assert_alike(runs[0][0])
    assert (runs[0][1].sampling_logprobs - runs[0][1].logprobs).abs().max() > 2e-3  # one update old


def test_colocated(tmp_path: Path):
    """In vLLM's own environment, which has none of lit-ppo's other dependencies."""
    model = make_causal_lm(tmp_path / "model", "llama", **SIZE)
    done = run_in_environment("-m", "tests.helpers.colocated", model)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "largest difference" in done.stdout
