"""ModelSource: what is loaded or built, with which tokenizer and seed, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_ppo import LitSFT
from lit_ppo.supervised.source import ModelSource
from tests.helpers.supervised import weights
from tests.helpers.tiny import FAMILIES, make_causal_lm, make_tokenizer


def source(model: Any, tokenizer: Any = None, **model_kwargs: Any) -> ModelSource:
    model, tokenizer = (str(path) if isinstance(path, Path) else path for path in (model, tokenizer))
    return ModelSource("LitSFT", AutoModelForCausalLM, model, tokenizer, model_kwargs)


def test_a_new_model_takes_its_vocabulary_and_ids_from_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, bos=True)
    config = source(dict(FAMILIES["llama"]), tmp_path).make().config
    assert config.hidden_size == 16
    assert config.vocab_size == len(tokenizer)
    ids = (config.pad_token_id, config.eos_token_id, config.bos_token_id)
    assert ids == (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)


def test_new_weights_depend_only_on_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tokenizer(tmp_path)

    def build(seed: int, draws: int) -> torch.Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        torch.rand(draws)  # what other parts of a program may have drawn
        return weights(source(dict(FAMILIES["gpt2"]), tmp_path).make())

    first = build(3, draws=1)
    assert torch.equal(first, build(3, draws=7))
    assert not torch.equal(first, build(4, draws=1))


def test_loaded_models_are_in_training_mode(tiny_lm: Path) -> None:
    assert source(tiny_lm).make().training


def test_a_checkpoint_in_bfloat16_is_loaded_in_float32_unless_asked(tmp_path: Path) -> None:
    path = make_causal_lm(tmp_path)
    AutoModelForCausalLM.from_pretrained(path).to(torch.bfloat16).save_pretrained(path)
    assert source(path).make().dtype == torch.float32
    assert source(path, dtype="bfloat16").make().dtype == torch.bfloat16


@pytest.mark.parametrize("new", [True, False])
def test_model_kwargs_reach_the_model(tiny_lm: Path, new: bool) -> None:
    for attention in ("eager", "sdpa"):
        model = source(dict(FAMILIES["gpt2"]) if new else tiny_lm, tiny_lm, attn_implementation=attention).make()
        assert model.config._attn_implementation == attention


def test_the_tokenizer_is_the_models_unless_named(tiny_lm: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, words=["film"])
    assert len(source(tiny_lm).tokenizer) > 5
    assert len(source(tiny_lm, tmp_path).tokenizer) == 4


def test_the_tokenizer_may_be_written_after_construction(tmp_path: Path) -> None:
    later = source(dict(FAMILIES["gpt2"]), tmp_path / "later")
    make_tokenizer(tmp_path / "later")
    later.make()
    assert len(later.tokenizer) > 5


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token(tmp_path: Path) -> None:
    loaded = source(make_causal_lm(tmp_path, tokenizer=make_tokenizer(pad=False)))
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id is not None
    assert loaded.make().config.pad_token_id is None  # nothing of an exported LM's config changes


def test_a_tokenizer_without_pad_and_end_token_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(pad=False)
    path = make_causal_lm(tmp_path, tokenizer=tokenizer)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match=r"LitSFT\(tokenizer=.*no pad token and no end-of-sequence token"):
        _ = source(path).tokenizer


def test_settings_without_a_model_type_are_refused() -> None:
    with pytest.raises(ValueError, match=r"LitSFT\(model=.*\): no model_type; name one"):
        LitSFT({"n_embd": 16}, tokenizer="somewhere")


def test_a_new_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LitSFT\(tokenizer=None\): a model from scratch has no tokenizer"):
        LitSFT(dict(FAMILIES["gpt2"]))


def test_a_family_that_would_replace_the_tokenizer_is_refused(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"qwen2 checkpoint with a tokenizer class of its own.*another model_type"):
        source(dict(FAMILIES["qwen2"]), tmp_path).make()


@pytest.mark.parametrize("argument", ["model", "tokenizer"])
def test_a_path_that_does_not_exist_is_named(tiny_lm: Path, tmp_path: Path, argument: str) -> None:
    paths = {"model": tiny_lm, "tokenizer": tiny_lm, argument: tmp_path / "nowhere"}
    with pytest.raises(ValueError, match=rf"LitSFT\({argument}='.*nowhere'\): cannot be loaded"):
        source(**paths).make()


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, words=[f"word{i}" for i in range(500)])
    with pytest.raises(ValueError, match=r"503 tokens, but the model embeds \d+; use the model's own tokenizer"):
        source(tiny_lm, tmp_path).make()
