"""Checkpoints as people hold them: names of wrappers, half of the weights, the wrong head, adapters."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_ppo import LitPPO, LitRewardModel, LitSFT, RewardModel
from lit_ppo.models import pretrained
from lit_ppo.models.load import load_causal_lm, load_critic, load_tokenizer
from lit_ppo.models.pretrained import load_pretrained
from lit_ppo.models.stored import sampled_digest, stored
from tests.helpers.tiny import make_causal_lm, make_reward_model
from tests.helpers.toys import count_good, make_module

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
IDS = torch.tensor([[5, 6, 7, 8]])


def rewritten(source: Path, target: Path, rename: Callable[[str], str | None], file: str = "model.safetensors") -> str:
    """A copy of a folder with other names of weights; those without a name are left out."""
    shutil.copytree(source, target)
    named = {rename(name): weight for name, weight in load_file(target / file).items()}
    save_file({name: weight for name, weight in named.items() if name}, target / file, metadata={"format": "pt"})
    return str(target)


def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits  # type: ignore[no-any-return]


def reward(path: str) -> Any:
    rewards = RewardModel(path)
    rewards.build()
    return rewards.model


LOADERS: dict[str, Callable[[str], Any]] = {
    "LitPPO(actor": lambda path: load_causal_lm("LitPPO(actor", path, {}),
    "LitPPO(critic": lambda path: load_critic("LitPPO(critic", path, {}).backbone,
    "LitSFT(model": lambda path: LitSFT(path).make_model(),
    "LitRewardModel(model": lambda path: LitRewardModel(path).make_model(),
    "RewardModel(model": reward,
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_names_of_wrappers_are_stripped(tmp_path: Path, family: str) -> None:
    """Of TRL's value heads, DDP, DeepSpeed, a module around the model, torch.compile and FSDP1, also inside a name."""
    lm = make_causal_lm(tmp_path / "lm", family, scale=3.0)
    stock = logits(AutoModelForCausalLM.from_pretrained(lm))
    inside = {"h.0.": "h.0._orig_mod.", "layers.0.": "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."}
    for i, before in enumerate(("pretrained_model.", "_orig_mod.", "_forward_module.module.", "actor.model.", "")):

        def rename(name: str, before: str = before) -> str:
            for plain, wrapped in inside.items():
                name = name.replace(plain, wrapped)
            return before + name

        path = rewritten(lm, tmp_path / str(i), rename)
        assert logits(LOADERS["LitPPO(actor"](path)).equal(stock)
        again = tmp_path / f"again {i}"
        LitSFT(path).save_pretrained(again)  # and exported without them
        assert logits(AutoModelForCausalLM.from_pretrained(again)).equal(stock)


@pytest.mark.parametrize("where", LOADERS)
def test_missing_weights_are_refused_and_five_are_named(tmp_path: Path, where: str) -> None:
    """Twelve weights of GPT-2's second block are gone."""
    make = make_reward_model if where.startswith("Reward") else make_causal_lm
    path = rewritten(make(tmp_path / "full"), tmp_path / "half", lambda name: None if ".1." in name else name)
    first = "transformer.h.1.attn.c_attn.bias, transformer.h.1.attn.c_attn.weight, transformer.h.1.attn.c_proj.bias"
    with pytest.raises(ValueError, match=rf"^{re.escape(where)}=.*lacks {first}, \S+, \S+ and 7 more of .*random"):
        LOADERS[where](path)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("where", ["LitPPO(actor", "LitSFT(model"])
def test_a_reward_model_is_no_causal_lm(tmp_path: Path, family: str, where: str) -> None:
    """GPT-2's head is its embedding: no weight is missing, and yet it never predicted a token."""
    path = str(make_reward_model(tmp_path, family))
    with pytest.raises(ValueError, match=r"a \w+ForSequenceClassification, a reward model.*lacks lm_head.weight"):
        LOADERS[where](path)


def test_fresh_heads_are_said_to_be_new(tmp_path: Path, tiny_lm: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for where in ("LitPPO(critic", "LitRewardModel(model"):
        LOADERS[where](str(tiny_lm))
    LOADERS["LitPPO(critic"](str(make_reward_model(tmp_path)))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("lightning")]
    assert ["value head is new" in said[0], "score.weight" in said[1], "as the reward model's" in said[2]] == [True] * 3


def adapted(base: Any, folder: Path, task: str) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type=task, init_lora_weights=False))
    model.save_pretrained(str(folder))
    return model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_is_merged_into_its_base_everywhere(tmp_path: Path, family: str) -> None:
    """As peft computes it; the tokenizer is the base's, and names of wrappers are stripped here too."""
    lm = make_causal_lm(tmp_path / "lm", family, scale=3.0)
    policy = adapted(AutoModelForCausalLM.from_pretrained(lm), tmp_path / "policy", "CAUSAL_LM")
    one = {"num_labels": 1, "pad_token_id": 0}
    scorer = adapted(AutoModelForSequenceClassification.from_pretrained(lm, **one), tmp_path / "scorer", "SEQ_CLS")
    wrapped = rewritten(tmp_path / "policy", tmp_path / "w", lambda x: f"_orig_mod.{x}", "adapter_model.safetensors")
    for path in (str(tmp_path / "policy"), wrapped):
        for where in ("LitPPO(actor", "LitSFT(model"):
            torch.testing.assert_close(logits(LOADERS[where](path)), logits(policy), rtol=1e-5, atol=1e-5)
    for where in ("RewardModel(model", "LitRewardModel(model"):
        torch.testing.assert_close(
            logits(LOADERS[where](str(tmp_path / "scorer"))), logits(scorer), rtol=1e-5, atol=1e-5
        )
    for path, model in ((wrapped, policy), (str(tmp_path / "scorer"), scorer)):
        states = LOADERS["LitPPO(critic"](path)(input_ids=IDS).last_hidden_state
        expected = model.base_model.model.base_model(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    critic = load_critic("LitPPO(critic", str(tmp_path / "scorer"), {})
    head = scorer.base_model.model.score.modules_to_save["default"].weight
    assert critic.value_head.weight.equal(head)
    assert load_tokenizer("LitPPO(actor", wrapped).get_vocab() == load_tokenizer("LitPPO(actor", str(lm)).get_vocab()
    with pytest.raises(ValueError, match="adapter of a reward model or classifier"):
        LOADERS["LitPPO(actor"](str(tmp_path / "scorer"))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_what_of_an_adapter_is_missing_is_named(tmp_path: Path, tiny_lm: Path) -> None:
    adapted(AutoModelForCausalLM.from_pretrained(tiny_lm), tmp_path / "a", "CAUSAL_LM")
    file = "adapter_model.safetensors"
    path = rewritten(tmp_path / "a", tmp_path / "half", lambda name: None if ".1." in name else name, file)
    with pytest.raises(ValueError, match=r"lacks base_model\S+h\.1\.attn\.c_attn\.lora_A\.weight"):
        LOADERS["LitSFT(model"](path)
    settings = tmp_path / "a" / "adapter_config.json"
    wide = str(make_causal_lm(tmp_path / "wide", n_embd=32))
    for base, problem in ((wide, "does not fit its base model"), ("/gone", "base model '/gone' cannot be loaded")):
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=rf"LitPPO\(actor=.*{problem}"):
            LOADERS["LitPPO(actor"](str(tmp_path / "a"))
    module = LitPPO(str(tiny_lm), reference=str(tmp_path / "a"), rewards=count_good, generation={"max_new_tokens": 2})
    with pytest.raises(ValueError, match=r"LitPPO\(reference=.*base model '/gone' cannot be loaded"):
        module.configure_model()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_an_adapter_without_peft_is_refused_everywhere_in_the_same_words(
    tmp_path: Path, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(AutoModelForCausalLM.from_pretrained(tiny_lm), tmp_path, "CAUSAL_LM")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    for where, load in LOADERS.items():
        with pytest.raises(
            ValueError, match=rf"^{re.escape(where)}='.*'\): it holds an adapter, which needs peft; pip"
        ):
            load(str(tmp_path))


@pytest.mark.parametrize("where", ["LitPPO(actor", "LitPPO(critic", "LitSFT(model", "LitRewardModel(model"])
def test_quantised_weights_are_not_trained(tiny_lm: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a quantiser says on the loaded model's config what a real one does."""

    def quantised(*args: Any, **kwargs: Any) -> Any:
        model, missing = pretrained.load_pretrained(*args, **kwargs)
        model.config.quantization_config = {"load_in_4bit": True}
        return model, missing

    for user in ("models.load", "supervised.source"):
        monkeypatch.setattr(f"lit_ppo.{user}.load_pretrained", quantised)
    ppo = make_module(tiny_lm, actor_lora={"r": 2} if "critic" in where else None)
    build = ppo.configure_model if "PPO" in where else lambda: LOADERS[where](str(tiny_lm))
    with pytest.raises(ValueError, match=rf"^{re.escape(where)}='.*'\): its weights are quantised.*in full precision"):
        build()


def test_large_files_are_told_apart_by_bytes_read_throughout(tmp_path: Path) -> None:
    """One in a hundred of its bytes changes, or a small head at its end; a copy is no other file."""
    content = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8)
    changed, head = content.copy(), content.copy()
    changed[::100] += 1
    head[-100:] += 1
    files = dict(zip("abcd", (content, changed, head, content[:-1]), strict=True))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data.tobytes())
    assert len({sampled_digest(tmp_path / name) for name in files}) == 4
    (tmp_path / "copy").write_bytes(content.tobytes())
    assert sampled_digest(tmp_path / "copy") == sampled_digest(tmp_path / "a")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_where_a_model_was_loaded_from(tmp_path: Path, tiny_lm: Path) -> None:
    """Of an adapter, its base counts too; of a hub name, the commit."""
    model, _ = load_pretrained(AutoModelForCausalLM, str(tiny_lm))
    assert model.stored == stored(str(tiny_lm), {})
    assert model.stored["files"].keys() == {"config.json", "model.safetensors"}
    assert stored("me/model", {}, SimpleNamespace(_commit_hash="c0ffee"))["files"] == {"commit": "c0ffee"}
    assert stored("me/model", {}, model.config) == {"path": "me/model", "files": {}}
    adapted(AutoModelForCausalLM.from_pretrained(tiny_lm), tmp_path / "adapter", "CAUSAL_LM")
    merged, _ = load_pretrained(AutoModelForCausalLM, str(tmp_path / "adapter"))
    base = {"base/config.json", "base/model.safetensors"}
    assert merged.stored["files"].keys() == {"adapter_config.json", "adapter_model.safetensors"} | base
