"""On a GPU the numbers are those of the CPU. Without a GPU both sides run on the CPU, so that the tests do not rot."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_ppo import PromptDataModule
from lit_ppo.advantages import Reinforce
from lit_ppo.attention import kernels
from lit_ppo.attention.choice import Heads, kernel_for
from lit_ppo.callbacks import AdvantageNormalization, DualClip, KLLoss, ValueClipping
from lit_ppo.device import exact_products
from lit_ppo.generation import capture
from lit_ppo.generation.config import neutral
from lit_ppo.models.actor_critic import Actor
from lit_ppo.parallel.ranks import sum_over_ranks
from lit_ppo.ppo import optimize, preflight
from tests.helpers.forwards import logprobs_of, values_of
from tests.helpers.memory_phases import predicted_and_measured
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import logged, make_data, make_module, make_trainer, texts, write_prompts
from tests.helpers.trick import make_trick, tricks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILES = pytest.mark.skipif(DEVICE != "cuda", reason="compiles for a GPU")
LORA = {"r": 2, "target_modules": "all-linear"}
EXCLUSIVE = (
    ("AdvantageRegression", "AdvantageNormalization"),
    ("AdvantageRegression", "CounterfactualActions"),
    ("AdvantageRegression", "CriticWarmup"),
    ("AdvantageRegression", "DualClip"),
    ("AdvantageRegression", "ImportanceCorrection"),
    ("AdvantageRegression", "KLEarlyStop"),
    ("AdvantageRegression", "KLLoss"),
    ("AdvantageRegression", "LearningRateAdaptation"),
    ("AdvantageRegression", "ReferenceUpdate"),
    ("AdvantageRegression", "RejectionSampling"),
    ("AdvantageRegression", "RewardNormalization"),
    ("AdvantageRegression", "RewardScaling"),
    ("AdvantageRegression", "RewardWhitening"),
    ("AdvantageRegression", "ValueClipping"),
    ("AdvantageRegression", "ValueNormalization"),
    ("CounterfactualActions", "DualClip"),
    ("CounterfactualActions", "RejectionSampling"),
    ("CounterfactualActions", "RewardWhitening"),
    ("LeastSquaresCritic", "CriticWarmup"),
    ("LeastSquaresCritic", "RejectionSampling"),
    ("LeastSquaresCritic", "RewardWhitening"),
    ("LeastSquaresCritic", "ValueClipping"),
    ("LeastSquaresCritic", "ValueNormalization"),
    ("DynamicSampling", "RejectionSampling"),
    ("CurriculumSampling", "PrioritizedSampling"),
    ("RewardNormalization", "RewardScaling"),
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*bf16 matrix products take"),  # slow CPUs run these tests too
    pytest.mark.filterwarnings("ignore:GPU available but not used"),  # runs on the CPU are what others are compared to
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated"),  # by parts of torch.compile
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # exact products are meant
]


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact_products():
        yield


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal_lm(tmp_path_factory.mktemp(request.param), request.param, scale=4.0)


def fit(folder: Path, actor: Path, *, resume: Any = None, **overrides: Any) -> tuple[Any, Any]:
    names = ("accelerator", "precision", "max_steps")
    given = {"accelerator": DEVICE} | {name: overrides.pop(name) for name in names if name in overrides}
    folder.mkdir(exist_ok=True)
    module, trainer = make_module(actor, float32_matmul_precision="highest", **overrides), make_trainer(folder, **given)
    trainer.fit(module, make_data(folder), ckpt_path=resume, weights_only=False)
    return module, trainer


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu() for name, p in module.named_parameters()}


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 3e-2)])
def test_log_probs_values_and_gradients(model: Path, bf16: bool, tolerance: float) -> None:
    here, there = make_module(model), make_module(model).to(DEVICE)
    rows = here.rollout(["the film was", "a"], samples_per_prompt=2)
    moved = there.rollout(["the film was", "a"], samples_per_prompt=2)
    assert moved.response_ids.tolist() == rows.response_ids.tolist()
    found = []
    for module, experience, autocast in ((here, rows, False), (there, moved, bf16)):
        with torch.autocast(module.device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            logprobs, values = logprobs_of(module, experience), values_of(module, experience)
        (logprobs.mean() + values.mean()).backward()
        gradients = torch.cat([p.grad.cpu().flatten() for p in module.parameters() if p.grad is not None])
        found.append((logprobs.detach().cpu(), values.detach().cpu(), gradients))
    (logprobs, values, gradients), (theirs, their_values, their_gradients) = found
    torch.testing.assert_close(theirs, logprobs, rtol=0, atol=tolerance)
    torch.testing.assert_close(their_values, values, rtol=0, atol=tolerance)
    assert (their_gradients - gradients).norm() <= tolerance * gradients.norm() * (1 if not bf16 else 3)


def test_one_update_is_that_of_the_cpu(tmp_path: Path, model: Path) -> None:
    expected, there = fit(tmp_path / "cpu", model, accelerator="cpu", max_steps=1)
    found, here = fit(tmp_path / "gpu", model, max_steps=1)
    for name, value in weights(found).items():
        torch.testing.assert_close(value, weights(expected)[name], rtol=1e-4, atol=1e-4)
    for name in ("objective/score", "objective/kl", "policy/loss", "value/loss", "response/length"):
        assert logged(here)[0][name] == pytest.approx(logged(there)[0][name], rel=1e-3, abs=1e-4)


def test_one_update_in_bf16_is_near_that_of_the_cpu(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the same responses, which rounding would change; the change of the weights differs by less than 15%."""
    kept: list[Any] = []
    generate = Actor.generate

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(generate(self, *args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(preflight, "try_rollout", lambda *_: None)  # samples too, on a GPU
    monkeypatch.setattr(Actor, "generate", record)
    expected, there = fit(tmp_path / "cpu", model, accelerator="cpu", max_steps=1)
    again = iter(kept)
    monkeypatch.setattr(Actor, "generate", lambda *_, **__: next(again))
    found, here = fit(tmp_path / "gpu", model, precision="bf16-mixed", max_steps=1)
    start = make_module(model)
    start.configure_model()
    moved, theirs = ([weights(each)[name] - x for name, x in weights(start).items()] for each in (found, expected))
    difference = torch.cat([(a - b).flatten() for a, b in zip(moved, theirs, strict=True)]).norm()
    assert 0 < difference < 0.15 * torch.cat([x.flatten() for x in theirs]).norm()
    for name in ("objective/score", "objective/kl", "policy/loss", "value/loss", "response/length"):
        assert logged(here)[0][name] == pytest.approx(logged(there)[0][name], rel=5e-2, abs=5e-2)


@pytest.mark.filterwarnings("ignore:.*Monitor", "ignore:DynamicSampling")
@pytest.mark.parametrize("left_out", [0, 1])
def test_every_trick_makes_two_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: int) -> None:
    """In two runs: of two tricks that exclude each other, each has one of them."""
    actor = make_causal_lm(tmp_path / "lm", scale=4.0, n_layer=1)
    write_prompts(tmp_path / "prompts.jsonl")
    texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = tricks().keys() - {pair[left_out] for pair in EXCLUSIVE}
    module = make_module(actor, generation={"max_new_tokens": 4}, minibatch_size=4, samples_per_prompt=2)
    callbacks = [make_trick(name, live=True) for name in sorted(names)]
    trainer = make_trainer(tmp_path, accelerator=DEVICE, precision="bf16-mixed", callbacks=callbacks)
    trainer.fit(module, PromptDataModule("prompts.jsonl", batch_size=6, seed=0))
    assert trainer.global_step == 2
    assert all(value.isfinite().all() for value in weights(module).values())


def test_samples_depend_on_the_seed_alone(model: Path) -> None:
    def samples(seed: int, **options: Any) -> Any:
        module = make_module(model, seed=seed, **options).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
            return module.rollout(["the film was", "a", "we saw"], samples_per_prompt=4, logprobs=False).responses

    assert samples(1) == samples(1)
    assert samples(1) != samples(2)


@pytest.mark.parametrize(
    "options",
    [{}, {"disable_compile": True}, {"repetition_penalty": 1.3}, pytest.param({"compile_config": {}}, marks=COMPILES)],
)
def test_the_static_cache_samples_what_the_cpu_does(model: Path, options: dict[str, Any], caplog: Any) -> None:
    """In three looks of 16 tokens, so that graphs are recorded and the batch shrinks."""
    caplog.set_level("INFO")
    capture.say_once.cache_clear()
    generation = {"max_new_tokens": 40, **options}
    expected = make_module(model, generation=generation | {"cache_implementation": "dynamic", "compile_config": None})
    found = make_module(model, generation=generation | {"cache_implementation": "static"}).to(DEVICE)
    rows = [module.rollout(["the film was", "a", "we"], samples_per_prompt=3) for module in (expected, found)]
    assert rows[1].response_ids.tolist() == rows[0].response_ids.tolist()
    torch.testing.assert_close(rows[1].logprobs.cpu(), rows[0].logprobs, rtol=0, atol=1e-4)
    assert "without CUDA graphs" not in caplog.text
    assert "cache_implementation 'dynamic'" not in caplog.text


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("disable_compile", [False, True])
def test_no_step_waits_for_the_gpu(model: Path, disable_compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run, replays = capture.Runner.__call__, []

    def strict(runner: capture.Runner, shape: Any) -> Any:
        try:
            torch.cuda.set_sync_debug_mode("error")
            return run(runner, shape)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            replays.append(runner.graph is not None)

    monkeypatch.setattr(capture.Runner, "__call__", strict)
    generation = {"max_new_tokens": 40, "disable_compile": disable_compile}
    with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
        make_module(model, generation=generation).to(DEVICE).rollout(["the film was", "a"], samples_per_prompt=4)
    assert len(replays) > 16
    assert any(replays) != disable_compile


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_step_that_cannot_be_recorded_leaves_the_device_as_it_was() -> None:
    """It waits for a number. Then the device still draws numbers, and memory that is cached can be freed."""
    model = torch.nn.Linear(2, 2, device=DEVICE)
    torch.manual_seed(0)
    expected = torch.rand(3, device=DEVICE)
    torch.manual_seed(0)
    run = capture.Runner(lambda: model.weight.new_ones(8).sum().item(), model, neutral(), torch.device(DEVICE, 0))
    assert [run("a shape") for _ in range(4)] == [8.0] * 4
    assert not run.records
    assert torch.rand(3, device=DEVICE).equal(expected)
    cached = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    before = torch.cuda.memory_reserved()
    del cached
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before - 2**28


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_is_the_run_to_the_bit(tmp_path: Path, model: Path, precision: str) -> None:
    expected, _ = fit(tmp_path / "through", model, precision=precision, max_steps=2)
    _, trainer = fit(tmp_path / "first", model, precision=precision, max_steps=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    found, _ = fit(tmp_path / "second", model, precision=precision, max_steps=2, resume=tmp_path / "one.ckpt")
    found, expected = weights(found), weights(expected)
    assert all(found[name].equal(value) for name, value in expected.items())


def test_adapters_train_and_the_model_beneath_stays(tmp_path: Path, model: Path) -> None:
    module, trainer = fit(tmp_path, model, precision="bf16-mixed", actor_lora=LORA, critic_lora=LORA)
    assert logged(trainer)[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)  # the adapter changes nothing yet
    fresh = dict(make_module(model, actor_lora=LORA, critic_lora=LORA).models.actor.named_parameters())
    moved = {name for name, p in module.actor.named_parameters() if not p.detach().cpu().float().equal(fresh[name])}
    assert moved
    assert DEVICE == "cuda" or all("lora_" in name for name in moved)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_kernel_for_packed_rows_gives_what_sdpa_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 64 numbers, keys in groups, a sliding window in the upper layer; in bf16."""
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, **window}
    path = make_causal_lm(tmp_path, "qwen2", **shape)
    rows, found = make_module(path).rollout(["the film was", "a"], samples_per_prompt=4), []
    for devices in (("cuda",), ()):
        monkeypatch.setattr(kernels, "DEVICES", devices)
        module = make_module(path).to(DEVICE)
        moved = module.rollout(["the film was", "a"], samples_per_prompt=4, logprobs=False)
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
            logprobs = logprobs_of(module, moved)
        logprobs.sum().backward()
        found.append((logprobs.detach(), torch.cat([p.grad.flatten() for p in module.actor.parameters()])))
    assert len(rows) == len(found[0][0])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=3e-2)
    assert (found[0][1] - found[1][1]).norm() <= 5e-2 * found[1][1].norm()
    if list(kernels.installed()):
        heads = Heads(4, 2, 64)
        assert kernel_for(None, torch.device("cuda", 0), torch.bfloat16, heads) is not None


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_waits_for_the_gpu_once(
    tmp_path: Path, model: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch raises where the host waits, save for the transfer of the step's metrics."""

    class Watch(L.Callback):
        def on_minibatch_start(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("error" if module.rollouts == 2 else "default")

        def on_minibatch_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("error" if module.rollouts == 2 else "default")

        def on_update_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    def transfer(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        transfers.append(module.rollouts)
        return sum_over_ranks(*args, **kwargs)

    transfers: list[int] = []
    monkeypatch.setattr(optimize, "sum_over_ranks", transfer)
    tmp_path.joinpath("run").mkdir()
    adam = {"actor_optimizer": torch.optim.AdamW, "critic_optimizer": torch.optim.AdamW}
    tricks = [AdvantageNormalization(scope="minibatch"), DualClip(), ValueClipping(), KLLoss(coef=0.1, kind="exact")]
    module = make_module(model, max_grad_norm=1.0, **adam)
    trainer = make_trainer(tmp_path, accelerator=DEVICE, precision=precision, callbacks=[Watch(), *tricks])
    try:
        trainer.fit(module, make_data(tmp_path))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert transfers == [1] * 4 + [2] * 2  # 7 prompts, then 5, in minibatches of 5, twice
    assert all(group["fused"] for optimizer in trainer.optimizers for group in optimizer.param_groups)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:.*min_new_tokens sample from another distribution")
def test_activations_are_recomputed_where_they_do_not_fit(tmp_path: Path, model: Path) -> None:
    """Other tensors take all memory but 64 MiB; a micro-batch keeps more than that without recomputation."""
    wide = make_causal_lm(tmp_path / "wide", "llama", hidden_size=512, num_hidden_layers=8, intermediate_size=4096)
    module = make_module(
        wide, samples_per_prompt=16, minibatch_size=64, micro_batch_size=64, reference=None, kl_coef=0.0, critic=None,
        advantages=Reinforce(), generation={"max_new_tokens": 50, "min_new_tokens": 50},
    )  # fmt: skip

    class Fill(L.Callback):
        def on_fit_start(self, *_: Any) -> None:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0] - 2**26 - 3 * sum(p.nbytes for p in module.parameters())
            self.full = torch.empty(free, dtype=torch.uint8, device=DEVICE)

        def on_train_start(self, *_: Any) -> None:
            del self.full

    trainer = make_trainer(tmp_path, accelerator=DEVICE, max_steps=1, callbacks=[Fill()])
    trainer.fit(module, make_data(tmp_path, batch_size=4))
    assert module.model_settings.activation_checkpointing


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_frozen_models_take_half_the_memory_on_a_gpu(tmp_path: Path, model: Path) -> None:
    module, _ = fit(tmp_path, model, precision="bf16-mixed", max_steps=1)
    kinds = {p.dtype for p in module.reference.parameters() if p.ndim == 2}
    assert torch.bfloat16 in kinds
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:.*min_new_tokens sample from another distribution")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("options", [{}, {"actor_lora": LORA, "critic_lora": LORA}], ids=["full", "lora"])
def test_each_phase_needs_what_was_estimated(tmp_path: Path, precision: str, options: dict[str, Any]) -> None:
    """100 million weights, so that the workspace of cuBLAS, which is not counted, is small beside them."""
    shape = {"hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 2816, "max_position_embeddings": 256}
    found = predicted_and_measured(tmp_path, shape=shape, precision=precision, device="cuda", **options)
    for phase, (predicted, measured) in found.items():
        assert predicted == pytest.approx(measured, rel=0.1), phase
