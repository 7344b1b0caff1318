"""Errors of memory: what is said of messages as PyTorch writes them."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.optim import AdamW

from lit_ppo.callbacks import PPOCallback
from lit_ppo.memory import advice
from lit_ppo.memory.advice import Report, explain_memory
from lit_ppo.memory.resident import Resident
from tests.helpers.toys import make_data, make_module, make_trainer

CUDA = (
    "CUDA out of memory. Tried to allocate {tried}. GPU 0 has a total capacity of 79.15 GiB of which 1.25 GiB is free. "
    "Including non-PyTorch memory, this process has 77.90 GiB memory in use. Of the allocated memory 70.00 GiB is "
    "allocated by PyTorch, {graphs}and 6.00 GiB is reserved by PyTorch but unallocated. If reserved but unallocated "
    "memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
GRAPHS = "with 1.50 GiB allocated in private pools (e.g., CUDA Graphs), "
MPS = (
    "MPS backend out of memory (MPS allocated: 16.00 GiB, other allocations: 2.00 GiB, max allowed: 20.00 GiB). Tried "
    "to allocate 3.00 GiB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory "
    "allocations (may cause system failure)."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4294967296 bytes. Error code 12 (Cannot allocate memory)"
)
GIB = 2**30


@pytest.mark.parametrize("graphs", ["", GRAPHS])
def test_the_numbers_of_the_message_are_read(graphs: str) -> None:
    assert Report.of(CUDA.format(tried="20.00 GiB", graphs=graphs)) == (int(77.25 * GIB), 90 * GIB)
    assert Report.of(CUDA.format(tried="512.00 MiB", graphs=graphs)) == (int(77.25 * GIB), int(70.5 * GIB))
    assert Report.of(MPS) == (18 * GIB, 19 * GIB)
    assert Report.of(CPU) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("advice")


def said(folder: Path, lm: Path, text: str, phase: str, detail: str = "", held: float = 0, **options: Any) -> str:
    """The message; ``held``: GiB of weights, as much again of gradients, and twice of optimizer states to come."""
    module = make_module(lm, **options)
    make_trainer(folder, max_steps=0).fit(module, make_data(folder))
    size = int(held * GIB)
    resident = Resident(size, 0, 0, size, 2 * size)
    with patch.object(advice.Resident, "of", lambda module: resident), pytest.raises(torch.OutOfMemoryError) as caught:
        explain_memory(module, torch.OutOfMemoryError(text), phase, detail)
    return str(caught.value)


@pytest.mark.parametrize(
    ("tried", "held", "less"),
    [
        ("20.00 GiB", 0, 10240),  # 77 of 90 GiB are there; not more than half
        ("200.00 GiB", 0, 5120),  # 0.9 x 77.25 / 270 of 20480 are 5273
        ("20.00 GiB", 16, 3072),  # beside 64 GiB there are 13.25, and at least 74 are needed: 0.9 x 13.25 / 74 are 3300
    ],
)
def test_a_value_that_fits_is_named(folder: Path, lm: Path, tried: str, held: float, less: int) -> None:
    text = said(
        folder,
        lm,
        CUDA.format(tried=tried, graphs=""),
        "update",
        held=held,
        micro_batch_size=None,
        micro_batch_tokens=20480,
    )
    assert text.startswith("LitPPO(micro_batch_tokens=20480): out of memory in the update, which needs at least ")
    assert f"; set it to {less} or less, which changes only rounding; or try activation_checkpointing=True, " in text
    assert text.endswith(f"(CUDA out of memory. Tried to allocate {tried})")
    assert len(text) < 500


def test_no_batch_size_helps_where_weights_and_states_fill_the_device(folder: Path, lm: Path) -> None:
    """Four times 19 GiB are 76 of 77.25; seven tenths of a device hold 54, so two are needed."""
    text = said(folder, lm, CUDA.format(tried="2.00 GiB", graphs=""), "update", held=19)
    assert text.startswith(
        "LitPPO: out of memory in the update: weights, gradients and optimizer states take 76.00 GiB"
    )
    assert "of 77.25 GiB, so no batch size helps; train adapters (actor_lora, critic_lora), or use" in text
    assert "at least 2 devices" in text


def test_sampling_has_its_own_knob_and_a_response_that_does_not_fit_alone_is_said(folder: Path, lm: Path) -> None:
    cuda = CUDA.format(tried="20.00 GiB", graphs="")
    text = said(folder, lm, cuda, "rollout", "token 3/10", rollout_batch_size=8)
    assert text.startswith("LitPPO(rollout_batch_size=8): out of memory in the rollout, which")
    assert "set it to 4 or less" in text
    assert "a shorter max_new_tokens" in text
    assert "LitPPO(micro_batch_size=1): " in said(folder, lm, cuda, "rollout", "log-probs", micro_batch_size=1)
    assert "a response alone does not fit; or try" in said(folder, lm, cuda, "update", micro_batch_size=1)
    # a row has up to 4 + 10 tokens: fewer would be no smaller
    tokens = {"micro_batch_size": None, "micro_batch_tokens": 20}
    assert "set it to 14 or less" in said(folder, lm, cuda, "update", **tokens)
    assert "micro_batch_size=3): out of memory in the update; set it to 1 or less" in said(folder, lm, CPU, "update")
    assert "RewardModel(batch_size): out of memory in scoring; halve it" in said(folder, lm, cuda, "score")


def test_other_errors_are_left_alone() -> None:
    explain_memory(None, RuntimeError("shape mismatch"), "update", "")


def test_what_is_resident_is_counted(tmp_path: Path, lm: Path) -> None:
    """AdamW: two float32 states of each weight's size, and a count of steps of 4 bytes."""
    adam = {f"{name}_optimizer": lambda p: AdamW(p, lr=1e-5) for name in ("actor", "critic")}
    found: list[Resident] = []

    class Note(PPOCallback):
        def on_minibatch_end(self, trainer: Any, pl_module: Any, experience: Any, metrics: Any) -> None:
            found.append(Resident.of(pl_module))

    module = make_module(lm, **adam)
    make_trainer(tmp_path, callbacks=[Note()], max_steps=1).fit(module, make_data(tmp_path))
    trained = [p for p in module.parameters() if p.requires_grad]
    weights, n = 4 * sum(p.numel() for p in trained), len(trained)
    reference = 4 * sum(p.numel() for p in module.reference.parameters())
    assert found[0] == Resident(weights + reference, weights, 0, weights, 2 * weights + 4 * n)
    assert found[1] == Resident(weights + reference, weights, 2 * weights + 4 * n, weights, 0)
    assert Resident.of(module).gradients == 0, "freed after the update"
