"""Tiny local checkpoints and tokenizers that tests build themselves: real Hugging Face folders, no download."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

WORDS = [
    "the", "a", "film", "movie", "story", "plot", "actor", "was", "is", "felt", "very", "really", "good", "great",
    "bad", "awful", "dull", "bright", "and", "but", "not", "it", "this", "that", "we", "they", "saw", "loved",
    "hated", "ending", "scene", "music", "long", "short", "slow", "fast", "happy", "sad",
]  # fmt: skip

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)

HEADS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
LLAMA = {**HEADS, "intermediate_size": 32, "num_key_value_heads": 1}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "mistral": LLAMA,
    "gemma2": {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8},
    "cohere": LLAMA,
    "phi": {**HEADS, "intermediate_size": 32},
    "opt": {**HEADS, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "bert": {**HEADS, "intermediate_size": 32},
    "roberta": {**HEADS, "intermediate_size": 32},
    "fnet": {**HEADS, "intermediate_size": 32},
    "falcon": HEADS,
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
}
FAMILIES = {family: {"model_type": family, **sizes} for family, sizes in SIZES.items()}


def write_rows(path: Path, rows: Iterable[Any]) -> str:
    """A row a line, as JSON; returns the path as the arguments of data modules have it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_tokenizer(
    path: Path | None = None,
    words: list[str] | None = None,
    *,
    pad: bool = True,
    bos: bool = False,
    chat: bool = False,
) -> PreTrainedTokenizerFast:
    """A word tokenizer: ``[PAD]`` 0 (unless ``pad`` is False), ``[EOS]``, ``[UNK]``, then the words."""
    specials = [*(["[PAD]"] if pad else []), "[EOS]", "[UNK]", *(["[BOS]"] if bos else [])]
    vocabulary = {token: i for i, token in enumerate([*specials, *(words or [*WORDS, "user", "assistant"])])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="[BOS] $A", special_tokens=[("[BOS]", vocabulary["[BOS]"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]" if pad else None,
        eos_token="[EOS]",
        unk_token="[UNK]",
        bos_token="[BOS]" if bos else None,
        chat_template=CHAT_TEMPLATE if chat else None,
    )
    if path is not None:
        tokenizer.save_pretrained(path)
    return tokenizer


def make_config(family: str, tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> Any:
    """Configuration of a tiny model of the family, for the tokenizer's vocabulary."""
    return AutoConfig.for_model(
        **FAMILIES[family] | overrides,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def _save(path: Path, kind: Any, config: Any, *, seed: int, tokenizer: Any, scale: float = 1.0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_causal_lm(
    path: Path, family: str = "gpt2", *, seed: int = 0, tokenizer: Any = None, scale: float = 1.0, **overrides: Any
) -> Path:
    """A causal LM with random weights and its tokenizer, saved under ``path``; ``scale`` sharpens its predictions."""
    tokenizer = tokenizer or make_tokenizer()
    config = make_config(family, tokenizer, **overrides)
    return _save(path, AutoModelForCausalLM, config, seed=seed, tokenizer=tokenizer, scale=scale)


def make_reward_model(
    path: Path, family: str = "gpt2", *, seed: int = 1, tokenizer: Any = None, num_labels: int = 1, **overrides: Any
) -> Path:
    """A sequence classifier with random weights and its tokenizer, saved under ``path``."""
    tokenizer = tokenizer or make_tokenizer()
    config = make_config(family, tokenizer, num_labels=num_labels, **overrides)
    return _save(path, AutoModelForSequenceClassification, config, seed=seed, tokenizer=tokenizer)
