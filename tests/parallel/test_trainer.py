"""What modules check of a Trainer in ``setup``, before they load any model."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from lit_ppo import LitSFT
from lit_ppo.parallel.trainer import check_trainer
from tests.helpers.toys import make_module


@pytest.mark.parametrize("make", [make_module, lambda lm: LitSFT(str(lm))], ids=["ppo", "supervised"])
def test_lightnings_own_fsdp_is_refused_before_models_are_loaded(tiny_lm: Any, make: Any) -> None:
    module = make(tiny_lm)
    module._trainer = SimpleNamespace(strategy=FSDPStrategy(), precision="32-true")
    with pytest.raises(ValueError, match=r"FSDPStrategy\): .* use strategy='fsdp2'"):
        module.setup("fit")


@pytest.mark.parametrize(
    ("precision", "device", "emulates", "warns"),
    [
        ("bf16-mixed", "cpu", True, True),
        ("bf16-mixed", "cpu", False, False),
        ("32-true", "cpu", True, False),
        ("bf16-mixed", "cuda", True, False),
    ],
)
def test_emulated_bf16_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: str, emulates: bool, warns: bool
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not emulates, raising=False)
    strategy = SimpleNamespace(root_device=torch.device(device), load_checkpoint=torch.load)
    trainer: Any = SimpleNamespace(strategy=strategy, precision=precision)
    # warnings are errors in these tests
    with pytest.warns(UserWarning, match="use precision='32-true'") if warns else nullcontext():
        check_trainer(trainer)
