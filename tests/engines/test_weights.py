"""Weights go to an engine under the names, and with the values, of a saved checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_ppo.engines.weights import adapter_weights, checkpoint_weights, weights_key
from lit_ppo.models.load import load_causal_lm
from lit_ppo.models.lora import add_adapter, merged, save_adapter
from tests.helpers.engine_jobs import rollouts_on_shards
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny import LLAMA, make_causal_lm

MIXTRAL = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}


def assert_saved(model: Any, folder: Path) -> None:
    """All that ``save_pretrained`` writes, and nothing else."""
    model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    found = dict(checkpoint_weights(model))
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gemma2"])
def test_names_and_values_are_those_of_a_checkpoint(family: str, tmp_path: Path):
    assert_saved(load_causal_lm("actor", str(make_causal_lm(tmp_path / family, family)), {}), tmp_path / "saved")


def test_fused_experts_are_taken_apart(tmp_path: Path):
    """transformers computes with all experts in one tensor; checkpoints have one an expert."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", vocab_size=20, **MIXTRAL))
    assert_saved(model, tmp_path)


def test_tied_weights_come_once(tmp_path: Path):
    tied = load_causal_lm("actor", str(make_causal_lm(tmp_path / "m", "llama", tie_word_embeddings=True)), {})
    assert_saved(tied, tmp_path / "saved")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_is_added_as_peft_adds_it(family: str, tmp_path: Path):
    pytest.importorskip("peft")
    path = str(make_causal_lm(tmp_path / family, family))
    model = load_causal_lm("actor", path, {})
    fields = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True}
    add_adapter("LitPPO(actor_lora", model, fields, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = dict(merged(model, None, lambda: load_causal_lm("actor", path, {})).named_parameters())
    found = dict(checkpoint_weights(model))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-5, atol=1e-6)


def test_an_adapter_alone_has_peft_s_names(tmp_path: Path):
    pytest.importorskip("peft")
    model = load_causal_lm("actor", str(make_causal_lm(tmp_path / "llama", "llama")), {})
    add_adapter("LitPPO(actor_lora", model, {"r": 2, "target_modules": "all-linear"}, seed=0)
    save_adapter(model, None, tmp_path / "adapter")
    saved, found = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), dict(adapter_weights(model))
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_loading_weights_changes_the_key(tiny_lm: Path):
    model = load_causal_lm("actor", str(tiny_lm), {})
    before = weights_key(model)
    model.load_state_dict(model.state_dict())
    assert weights_key(model) != before


def test_shards_are_gathered_and_ranks_share_the_work(tmp_path: Path, tiny_llama: Path):
    on_ranks(2, rollouts_on_shards, str(tiny_llama), str(tmp_path), folder=tmp_path)
