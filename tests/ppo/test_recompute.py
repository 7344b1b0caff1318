"""Where the longest micro-batch does not fit, a GPU recomputes activations and says so, unless the user has decided."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ppo import activations
from lit_ppo.ppo import preflight
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import logged, make_data, make_module, make_trainer


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a GPU."""
    monkeypatch.setattr(preflight, "RECOMPUTE_ON", ("cpu",))


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A backward runs out of memory unless activations are recomputed; returns what was tried."""
    tried: list[str] = []
    forward = preflight._forward

    def limited(module: Any, name: str, micro: Any, n_rows: int) -> Any:
        model = getattr(module, name)
        block = next(part for part in model.modules() if type(part).__name__ == "GPT2Block")
        recomputes = isinstance(block.forward, partial)
        tried.append(f"{name} {'recomputed' if recomputes else 'kept'}")
        if not recomputes and name == "critic":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return forward(module, name, micro, n_rows)

    monkeypatch.setattr(preflight, "_forward", limited)
    return tried


def fit(folder: Path, actor: Path, **arguments: Any) -> Any:
    module, trainer = make_module(actor, **arguments), make_trainer(folder)
    trainer.fit(module, make_data(folder))
    return module, logged(trainer)


def test_it_is_turned_on_after_a_failed_trial(
    tmp_path: Path, tiny_lm: Path, small_memory: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The run is that of one without: gradients are the same to the bit."""
    caplog.set_level("INFO")
    module, rows = fit(tmp_path, tiny_lm)
    assert small_memory == ["actor kept", "critic kept", "actor recomputed", "critic recomputed"]
    (said,) = [message for message in caplog.messages if "activation_checkpointing" in message]
    assert said.startswith(
        "LitPPO(activation_checkpointing=None): turned on, since a micro-batch of 3 x 14 tokens does"
    )
    plain, expected = fit(tmp_path, tiny_lm, activation_checkpointing=True)
    assert [row["policy/loss"] for row in rows] == [row["policy/loss"] for row in expected]
    assert all(a.equal(b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))


def test_what_the_user_has_decided_stays(tmp_path: Path, tiny_lm: Path, small_memory: list[str]) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"micro_batch_size=3\): .*or try activation_checkpointing=True"):
        fit(tmp_path, tiny_lm, activation_checkpointing=False)
    with pytest.raises(ValueError, match=r"LitPPO\(activation_checkpointing='auto'\): "):
        make_module(tiny_lm, activation_checkpointing="auto")


def test_where_it_fits_nothing_changes(tmp_path: Path, tiny_lm: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    module, _ = fit(tmp_path, tiny_lm)
    assert module.model_settings.activation_checkpointing is None
    assert not [message for message in caplog.messages if "activation_checkpointing" in message]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_kept_grows_with_rows(tmp_path: Path, family: str) -> None:
    """The number for nine rows, from one and two, is that of a forward of nine rows; recomputed blocks keep less."""
    module = make_module(make_causal_lm(tmp_path, family), minibatch_size=9, micro_batch_size=9)
    module.configure_model()
    micro = preflight.longest_micro_batch(module.models, 5, 9, 9, None)
    for name in ("actor", "critic"):
        forward = partial(preflight._forward, module, name, micro)
        expected = activations._kept(partial(forward, 9))
        found = activations.kept_bytes(forward, 9)
        assert found == pytest.approx(expected, rel=0.02)
    activations.checkpoint_activations(module.actor)
    assert activations.kept_bytes(partial(preflight._forward, module, "actor", micro), 9) < 0.5 * expected


@pytest.mark.parametrize(("free", "recomputes"), [(2**34, None), (2**12, True)])
def test_several_processes_compare_with_the_free_memory(
    tmp_path: Path, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch, free: int, recomputes: bool | None
) -> None:
    monkeypatch.setattr(preflight, "n_ranks", lambda: 2)
    monkeypatch.setattr(preflight, "free_bytes", lambda device: free)
    module, _ = fit(tmp_path, tiny_lm)
    assert module.model_settings.activation_checkpointing is recomputes
