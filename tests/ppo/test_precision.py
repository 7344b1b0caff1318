"""Precision by device: TF32 and bfloat16 for frozen models on CUDA, nothing by default elsewhere."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ppo import LitPPO, RewardModel
from lit_ppo.device import exact_products
from lit_ppo.ppo import preflight
from lit_ppo.ppo.preflight import apply_precision
from tests.helpers.toys import logged, make_data, make_module, make_trainer

LORA = {"r": 2, "target_modules": "all-linear"}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with exact_products():
        yield


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [("cpu", None, "medium"), ("cuda", None, "high"), ("cuda", "highest", "highest"), ("cpu", "high", "high")],
)
def test_products_in_float32_use_tf32_on_cuda_unless_told_otherwise(
    tiny_lm: Path, kind: str, given: Any, expected: str
) -> None:
    torch.set_float32_matmul_precision("medium")
    apply_precision(make_module(tiny_lm, float32_matmul_precision=given), kind, "32-true", sharded=False)
    assert torch.get_float32_matmul_precision() == expected


def test_a_precision_set_through_torchs_backends_is_respected(tiny_lm: Path) -> None:
    """In a process of its own: torch does not forget that it was set in this way."""
    code = (
        "import sys, torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "from lit_ppo.device import exact_products\n"
        "from lit_ppo.ppo.preflight import apply_precision\n"
        "from tests.helpers.toys import make_module\n"
        "module = make_module(sys.argv[1])\n"
        "apply_precision(module, 'cuda', '32-true', sharded=False)\n"
        "with exact_products(): assert torch.backends.cuda.matmul.fp32_precision == 'ieee'\n"
        "module.configure_model(); assert torch.backends.cuda.matmul.fp32_precision == 'tf32'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_lm)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_precision_is_refused(tiny_lm: Path) -> None:
    message = r"LitPPO\(float32_matmul_precision='tf32'\): must be one of 'highest', 'high', 'medium'"
    with pytest.raises(ValueError, match=message):
        make_module(tiny_lm, float32_matmul_precision="tf32")


@pytest.mark.parametrize(
    ("kind", "precision", "sharded", "given", "halved"),
    [
        ("cuda", "bf16-mixed", False, None, True),
        ("cuda", "bf16-mixed", False, "float32", False),
        ("cuda", "bf16-mixed", True, None, False),
        ("cuda", "32-true", False, None, False),
        ("cpu", "bf16-mixed", False, None, False),
    ],
)
def test_frozen_models_are_in_bfloat16_where_bf16_mixed_runs_on_cuda(
    tiny_lm: Path, monkeypatch: pytest.MonkeyPatch, kind: str, precision: str, sharded: bool, given: Any, halved: bool
) -> None:
    said: list[str] = []
    monkeypatch.setattr(preflight, "rank_zero_info", said.append)
    module = make_module(tiny_lm, reference_dtype=given)
    apply_precision(module, kind, precision, sharded=sharded)
    assert module.model_settings.halve_frozen is halved
    assert any("kept in bfloat16" in line for line in said) is halved


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("actor", ["lm", "tiny_llama"])
def test_frozen_linear_layers_in_bfloat16_change_no_number(
    request: Any, tmp_path: Path, tiny_reward: Path, monkeypatch: pytest.MonkeyPatch, actor: str, lora: Any
) -> None:
    def run(name: str) -> tuple[LitPPO, list[dict[str, float]]]:
        options = {"rewards": RewardModel(str(tiny_reward)), "actor_lora": lora, "critic_lora": lora}
        module = make_module(request.getfixturevalue(actor), samples_per_prompt=2, **options)
        (tmp_path / name).mkdir()
        trainer = make_trainer(tmp_path / name, precision="bf16-mixed")
        trainer.fit(module, make_data(tmp_path / name))
        timed = ("time/", "throughput/", "memory/")
        return module, [{k: v for k, v in row.items() if not k.startswith(timed)} for row in logged(trainer)]

    _, expected = run("float32")
    monkeypatch.setattr(preflight, "apply_precision", lambda module, *_, **__: halve(module))
    module, found = run("bfloat16")
    assert found == expected
    frozen = [p for p in module.parameters() if not p.requires_grad and p.ndim == 2]
    assert {torch.bfloat16, torch.float32} == {p.dtype for p in frozen}  # embeddings and scoring heads stay
    assert all(p.dtype == torch.float32 for p in module.parameters() if p.requires_grad)
    assert module.rollout(["the film"]).ref_logprobs.isfinite().all()  # also without autocast


def halve(module: LitPPO) -> None:
    module.model_settings.halve_frozen = True
