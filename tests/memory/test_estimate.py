"""Predicted bytes against those of runs."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adafactor, AdamW

from lit_ppo.callbacks import LeastSquaresCritic, PPOCallback
from lit_ppo.engines.vllm import VLLMEngine
from lit_ppo.memory.estimate import ACTOR, CHECKPOINT, CRITIC, FULL_GRADIENTS, HELD, HOST, ROLLOUT, Estimate, estimate
from lit_ppo.memory.job import Job
from lit_ppo.memory.optimizers import StateSizes
from lit_ppo.memory.sampling import notes
from tests.helpers.memory_run import measured_run
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import make_data, make_module, make_trainer

LORA = {"r": 4, "target_modules": "all-linear"}


class Gradients(PPOCallback):
    """Bytes of all gradients of a step."""

    def on_minibatch_end(self, trainer: Any, pl_module: Any, experience: Any, metrics: Any) -> None:
        models = {"actor": pl_module.actor, "critic": pl_module.critic}
        self.n_bytes = {n: n_bytes(p.grad for p in m.parameters() if p.grad is not None) for n, m in models.items()}


def line(found: Estimate, name: str, phase: str = HELD) -> int:
    """The bytes of the line with this name."""
    return sum(each.n_bytes for each in found.lines if each.phase == phase and each.name == name)


def n_bytes(tensors: Any) -> int:
    """Of tensors that differ."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_weights_gradients_and_states_are_those_of_a_run(tmp_path: Path, lora: dict[str, Any] | None) -> None:
    arguments: dict[str, Any] = {"critic": "actor", "actor_lora": lora, "critic_lora": lora}
    arguments["actor_optimizer"] = lambda p: AdamW(p, lr=1e-5, amsgrad=True)
    arguments["critic_optimizer"] = lambda p: SGD(p, lr=1e-5, momentum=0.9)
    module = make_module(make_causal_lm(tmp_path / "actor"), **arguments)
    found = estimate(module, Job(batch_size=4, prompt_tokens=4))
    gradients = Gradients()
    make_trainer(tmp_path, max_steps=1, callbacks=[gradients]).fit(module, make_data(tmp_path))
    for name, optimizer in zip(("actor", "critic"), module.optimizers(use_pl_optimizer=False), strict=True):
        model = getattr(module, name)
        assert line(found, f"{name}: weights") == n_bytes(model.parameters())
        assert line(found, f"{name}: gradients", CRITIC) == gradients.n_bytes[name]
        states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        assert line(found, f"{name}: optimizer states") == n_bytes(states)
    reference = 0 if lora else n_bytes(module.reference.parameters())
    assert line(found, "reference: frozen weights") == reference


def test_a_critic_that_is_solved_for_has_weights_alone(tmp_path: Path) -> None:
    module = make_module(make_causal_lm(tmp_path / "actor"), critic="actor")
    found = estimate(module, Job(batch_size=4, prompt_tokens=4, critic_frozen=True))
    gradients = Gradients()
    tricks = [LeastSquaresCritic(), gradients]
    make_trainer(tmp_path, max_steps=1, callbacks=tricks).fit(module, make_data(tmp_path))
    assert gradients.n_bytes["critic"] == 0
    assert not module.optimizers(use_pl_optimizer=False)[1].state
    assert line(found, "critic: frozen weights") == n_bytes(module.critic.backbone.parameters())
    assert not [each.name for each in found.lines if each.phase == CRITIC]
    assert not [each.name for each in found.lines if each.name.startswith("critic: ") and "frozen" not in each.name]


@pytest.mark.filterwarnings("ignore:.*emulates them")
def test_weights_in_bfloat16_and_their_states_are_those_of_a_run(tmp_path: Path) -> None:
    """Kahan's sums keep three numbers for a weight, 10 bytes with it and its gradient; the value head is float32."""
    optimi = pytest.importorskip("optimi")
    kahan = {f"{name}_optimizer": lambda p: optimi.AdamW(p, lr=1e-5) for name in ("actor", "critic")}
    module = make_module(make_causal_lm(tmp_path / "actor"), critic="actor", **kahan)
    found = estimate(module, Job(batch_size=4, prompt_tokens=4, precision="bf16-true"))
    make_trainer(tmp_path, max_steps=1, precision="bf16-true").fit(module, make_data(tmp_path))
    held = sum(line(found, f"actor: {part}") for part in ("weights", "optimizer states"))
    assert held + line(found, "actor: gradients", ACTOR) == 10 * sum(p.numel() for p in module.actor.parameters())
    assert line(found, "critic: weights") == n_bytes(module.critic.parameters())
    assert line(found, "reference: frozen weights") == n_bytes(module.reference.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_that_of_a_run(tmp_path: Path) -> None:
    """The resident memory of a process, over what it had after a small run, which loads all libraries."""
    predicted, measured = measured_run(tmp_path)
    assert measured == pytest.approx(predicted, rel=0.15)


def test_shards_are_those_of_the_first_process() -> None:
    """AdamW has two float32 states of the shape of each weight, and the number of its steps."""
    sizes = StateSizes(lambda p: AdamW(p, lr=1e-5))
    weights = [torch.empty(5, 3, device="meta"), torch.empty(1, device="meta")]
    assert sizes.n_bytes(weights) == (15 + 1) * 8 + 2 * 4
    assert sizes.n_bytes(weights, n_shards=2) == (9 + 1) * 8 + 2 * 4


def test_factored_states_are_counted_by_rows_and_columns() -> None:
    """Adafactor keeps a number for each row and each column of a matrix."""
    sizes = StateSizes(lambda p: Adafactor(p, lr=1e-5))
    assert sizes.n_bytes([torch.empty(1000, 300, device="meta")]) == (1000 + 300) * 4 + 4


def test_split_sampling_needs_a_smaller_cache(tmp_path: Path) -> None:
    """Keys and values in float32 of 3 responses at a time: 45 tokens hold three of 4 + 10."""
    module = make_module(make_causal_lm(tmp_path / "actor"), critic="actor", rollout_batch_tokens=45)
    found = estimate(module, Job(batch_size=8, prompt_tokens=4))
    (cache,) = [each for each in found.lines if each.name == "key-value cache"]
    config = module.model_settings.load_actor().config
    assert cache.n_bytes == 3 * 14 * config.n_layer * 2 * config.n_embd * 4
    assert cache.assumes.startswith("3 responses x 14 tokens")


def test_a_static_cache_has_room_for_a_multiple_of_64_tokens(tmp_path: Path) -> None:
    """On CUDA by default: prompt and response but for the last token, 4 + 70 - 1, take 128."""
    options: dict[str, Any] = {"generation": {"max_new_tokens": 70}, "samples_per_prompt": 2}
    module = make_module(make_causal_lm(tmp_path / "actor", "llama"), critic="actor", **options)
    config = module.model_settings.load_actor().config
    token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    for on_gpu, tokens in ((True, 128), (False, 74)):
        cache = line(estimate(module, Job(batch_size=8, prompt_tokens=4, on_gpu=on_gpu)), "key-value cache", ROLLOUT)
        assert cache == pytest.approx(16 * tokens * token, abs=64)  # and positions


def test_what_sampling_needs_beside_is_said(tmp_path: Path) -> None:
    module, job = make_module(make_causal_lm(tmp_path / "actor")), Job(batch_size=8, prompt_tokens=4, on_gpu=True)
    assert "pool of CUDA graphs" in notes(module, job)[0]
    assert notes(module, replace(job, on_gpu=False)) == []
    engine = object.__new__(VLLMEngine)
    engine.local = SimpleNamespace(gpu_memory_utilization=0.4)  # type: ignore[assignment]
    module.sampler = SimpleNamespace(engine=engine)  # type: ignore[assignment]
    assert "up to 40% of each card" in notes(module, job)[0]
    assert estimate(module, job).sampling is None


def test_sharded_models_are_gathered_and_reduced_as_the_strategy_does(tmp_path: Path) -> None:
    """GPT-2's linear layers in 2 bytes and the rest in 4; full gradients of one model; a checkpoint on the host."""
    actor = make_causal_lm(tmp_path / "actor")
    adam = {f"{name}_optimizer": lambda p: AdamW(p, lr=1e-5) for name in ("actor", "critic")}
    module = make_module(actor, critic="actor", micro_batch_size=2, minibatch_size=8, **adam)
    job = Job(batch_size=8, prompt_tokens=4, precision="bf16-mixed", n_processes=2, strategy="fsdp2", on_gpu=True)
    found, named = estimate(module, job), dict(module.model_settings.load_actor().named_parameters())
    linear = sum(p.numel() for name, p in named.items() if ".c_" in name)
    weights, width = sum(p.numel() for p in named.values()), module.model_settings.load_actor().config.n_embd
    assert line(found, "gathered weights", ROLLOUT) == 2 * linear + 4 * (weights - linear)
    assert line(found, FULL_GRADIENTS, ACTOR) == 4 * weights
    assert line(found, FULL_GRADIENTS, CRITIC) == 4 * (weights + width + 1)
    assert line(found, "the largest tensor in full", CHECKPOINT) == 4 * max(p.numel() for p in named.values())
    collected = 3 * 4 * (2 * weights + width + 1) + 4 * (2 * len(named) + 2)  # and the numbers of steps
    assert line(found, "the first process collects the checkpoint", HOST) == collected
    early = estimate(module, replace(job, every_micro_batch=True))
    assert found.sum(CRITIC) - early.sum(CRITIC) == 4 * (weights + width + 1)
