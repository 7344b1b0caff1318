"""Trained weights in bfloat16: only with optimizers whose small steps add up, and exact resumes with these."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_ppo import LitPPO, LitRewardModel, LitSFT
from lit_ppo.optim.precision import rounds_at_random, seed_rounding, survives_bfloat16, use_bfloat16_weights
from tests.helpers.toys import count_good, logged, make_data, make_module, make_trainer, texts

LR = 5e-7  # of LitPPO's actor
PLAIN = lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0)  # noqa: E731
LORA = {"r": 2, "target_modules": "all-linear"}

pytestmark = pytest.mark.filterwarnings("ignore:.*bf16 matrix products take|.*emulates them")


def kahan(parameters: Any, **options: Any) -> Any:
    optimi = pytest.importorskip("optimi")
    return optimi.AdamW(parameters, **{"lr": LR, "weight_decay": 0.0, **options})


def at_random(parameters: Any, **options: Any) -> Any:
    torchao = pytest.importorskip("torchao.optim")
    return torchao.AdamW8bit(parameters, **{"lr": LR, "weight_decay": 0.0, "bf16_stochastic_round": True, **options})


class Drawing(torch.optim.SGD):
    """Rounds as torchao does, after a step of SGD."""

    bf16_stochastic_round = True

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                exact = (p.detach().float() - self.param_groups[0]["lr"] * p.grad.float()).view(torch.int32)
                p.data.copy_(
                    ((exact + torch.randint(2**16, exact.shape, dtype=torch.int32)) & -(2**16)).view(torch.float32)
                )
                self.state[p]["step"] = self.state[p].get("step", 0) + 1


def moved(make: Callable[[Any], Any], dtype: torch.dtype) -> Tensor:
    """By 800 steps on noisy gradients, as those of PPO are."""
    g = torch.Generator().manual_seed(1)
    weight = nn.Parameter((0.05 * torch.randn(64, 64, generator=g)).to(dtype))
    start, mean, optimizer = weight.detach().float().clone(), torch.randn(64, 64, generator=g), make([weight])
    for _ in range(800):
        weight.grad = (mean + torch.randn(64, 64, generator=g)).to(dtype)
        optimizer.step()
    return weight.detach().float() - start


@pytest.mark.parametrize(
    ("make", "least", "most"),
    [(PLAIN, 0.0, 0.01), (kahan, 0.7, 1.05), (at_random, 0.9, 1.1)],
    ids=["AdamW", "kahan", "random"],
)
def test_accepted_optimizers_move_bfloat16_weights_as_float32_moves(make: Any, least: float, most: float) -> None:
    """The part of the float32 step that the step in bfloat16 makes: the projection on it."""
    torch.manual_seed(0)
    with torch.compiler.set_stance("force_eager"):  # torchao's are compiled
        ours, exact = moved(make, torch.bfloat16), moved(PLAIN, torch.float32)
    assert least <= float((ours * exact).sum() / exact.square().sum()) <= most
    assert survives_bfloat16(make([nn.Parameter(torch.zeros(2))])) is (make is not PLAIN)


def fit(folder: Path, actor: Path, optimizer: Any, *, resume: Any = None, steps: int = 2, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(folder, precision="bf16-true", max_steps=steps)
    module = make_module(actor, actor_optimizer=optimizer, critic_optimizer=optimizer, **options)
    trainer.fit(module, make_data(folder), ckpt_path=resume, weights_only=False)
    return module


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_run_keeps_actor_critic_and_reference_in_bfloat16(tmp_path: Path, tiny_llama: Path, lora: Any) -> None:
    def slow(parameters: Any) -> Any:
        return kahan(parameters, lr=1e-3)

    module = fit(tmp_path, tiny_llama, slow, steps=1, actor_lora=lora, critic_lora=lora)
    first = logged(module.trainer)[0]
    assert first["objective/kl"] == 0  # the reference has the actor's rounded weights
    assert first["objective/score"] * 7 == pytest.approx(round(first["objective/score"] * 7))  # the mean of counts
    float32 = {name for name, p in module.named_parameters() if p.dtype == torch.float32}
    assert float32 == {"critic.value_head.weight", "critic.value_head.bias"}
    assert all(buffer.dtype == torch.float32 for name, buffer in module.named_buffers() if "inv_freq" in name)
    module.save_pretrained(tmp_path / "out", adapter=lora is not None)
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    assert {x.dtype for x in load_file(tmp_path / "out" / file).values()} == {torch.bfloat16 if lora else torch.float32}


@pytest.mark.parametrize("make", [kahan, at_random, Drawing], ids=["kahan", "random", "drawing"])
def test_a_resumed_run_is_the_run_to_the_bit(tmp_path: Path, tiny_lm: Path, make: Any) -> None:
    def fast(parameters: Any) -> Any:
        return make(parameters, lr=1e-3)

    with torch.compiler.set_stance("force_eager"):
        expected = fit(tmp_path / "through", tiny_lm, fast)
        start = fit(tmp_path / "first", tiny_lm, fast, steps=1)
        start.trainer.save_checkpoint(tmp_path / "one.ckpt")
        torch.manual_seed(123)  # rounding depends on seed and step alone
        found = fit(tmp_path / "second", tiny_lm, fast, resume=tmp_path / "one.ckpt")
    for name, value in expected.named_parameters():
        assert found.get_parameter(name).equal(value), name
    assert not found.actor.model.get_input_embeddings().weight.equal(start.actor.model.get_input_embeddings().weight)


def test_draws_of_rounding_leave_others_alone_and_follow_the_step() -> None:
    def rounded(global_seed: int, steps: int) -> tuple[Tensor, Tensor]:
        weight = nn.Parameter(torch.zeros(50, dtype=torch.bfloat16))
        optimizer = Drawing([weight], lr=1e-3)
        assert rounds_at_random(optimizer)
        seed_rounding(optimizer, 7)
        torch.manual_seed(global_seed)
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.detach(), torch.rand(3)

    (first, rest), (again, other) = rounded(1, 2), rounded(2, 2)
    assert first.equal(again)
    torch.manual_seed(1)
    assert rest.equal(torch.rand(3))
    assert not rest.equal(other)


@pytest.mark.parametrize(
    ("make", "options", "problem"),
    [
        (LitPPO, {"generation": {"max_new_tokens": 4}}, r"LitPPO\(actor_optimizer=AdamW\): its steps are rounded away"),
        (LitSFT, {}, r"LitSFT\(optimizer=AdamW\): .*'bf16-true'\); use 'bf16-mixed', or .*optimi.AdamW \(pip install"),
        (LitRewardModel, {}, r"LitRewardModel\(optimizer=AdamW\): .*torchao.optim.AdamW8bit"),
        (LitSFT, {"optimizer": lambda p: kahan(p, kahan_sum=False)}, r"LitSFT\(optimizer=AdamW\): its steps are"),
    ],
)  # fmt: skip
def test_other_optimizers_are_refused(tmp_path: Path, tiny_lm: Path, make: Any, options: Any, problem: str) -> None:
    rewards = {"rewards": count_good} if make is LitPPO else {}
    with pytest.raises(ValueError, match=problem):
        make_trainer(tmp_path, precision="bf16-true").fit(make(str(tiny_lm), **options, **rewards), texts(tmp_path))


def test_what_does_not_combine_is_refused() -> None:
    """Shards are of float32; ranks that round at random alone would drift apart, which LitPPO's steps prevent."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"), shard=None)
    trainer: Any = SimpleNamespace(precision="bf16-true", strategy=strategy, world_size=2)
    ours, sft = SimpleNamespace(automatic_optimization=False), SimpleNamespace(automatic_optimization=True)
    make = {"optimizer": lambda parameters: Drawing(parameters, lr=0.1)}
    with pytest.raises(
        ValueError, match=r"Trainer\(precision='bf16-true'\): FSDP2 shards float32 weights; use '32-true'"
    ):
        use_bfloat16_weights(ours, trainer, make)
    del strategy.shard
    with pytest.raises(ValueError, match=r"\(optimizer=Drawing\): rounds at random, and each process would round"):
        use_bfloat16_weights(sft, trainer, make)
    assert use_bfloat16_weights(ours, trainer, make)
    assert strategy.precision_plugin.precision == "bf16-true"
    trainer.precision = "bf16-mixed"
    assert not use_bfloat16_weights(ours, trainer, {})


def test_sft_in_bfloat16_learns_and_computes_in_float32_between(tmp_path: Path, tiny_llama: Path) -> None:
    module = LitSFT(str(tiny_llama), optimizer=lambda p: kahan(p, lr=1e-2), float32_matmul_precision="highest")
    trainer = make_trainer(tmp_path, precision="bf16-true", max_steps=6)
    trainer.fit(module, texts(tmp_path))
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    losses = [row["train/loss"] for row in trainer.logger.rows if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("make", [LitSFT, LitRewardModel])
def test_supervised_modules_take_a_precision_of_products(tmp_path: Path, tiny_lm: Path, make: Any) -> None:
    with pytest.raises(ValueError, match=rf"{make.__name__}\(float32_matmul_precision='tf32'\): must be one of"):
        make(str(tiny_lm), float32_matmul_precision="tf32")
    before = torch.get_float32_matmul_precision()
    try:
        module = make(str(tiny_lm), float32_matmul_precision="medium")
        module._trainer = make_trainer(tmp_path)
        module.setup("fit")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
