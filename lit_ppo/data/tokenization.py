"""Train a tokenizer on the text at hand, for a model from scratch."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|endoftext|>"

MIN_VOCAB_SIZE = 256 + 2
"""Every byte and the two special tokens."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer and save it as a Hugging Face folder.

    Any text can be encoded, since every byte is a token. A text that does not begin with a space is given one, so
    that a word has the same token at the start of a text as inside it (decoded text then begins with a space).
    The result depends on the texts and ``vocab_size`` alone.

    Args:
        texts: The text to learn from.
        vocab_size: Number of tokens to reach, the 256 bytes, ``<|pad|>`` and ``<|endoftext|>`` among them; little
            text may give fewer.
        path: Folder to write; created if it is not there.

    Raises:
        ValueError: ``vocab_size`` has no room for bytes and special tokens, or there is no text.

    >>> import tempfile
    >>> tokenizer = train_tokenizer(["a fine film", "a fine plot"], vocab_size=270, path=tempfile.mkdtemp())
    >>> tokenizer.tokenize("fine"), tokenizer.pad_token_id, tokenizer.eos_token_id
    (['Ġfine'], 0, 1)
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"train_tokenizer(vocab_size={vocab_size}): the bytes and special tokens alone are {MIN_VOCAB_SIZE}; "
            f"use {MIN_VOCAB_SIZE} or more"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, _trainer(vocab_size))
    if backend.get_vocab_size() == MIN_VOCAB_SIZE < vocab_size:
        raise ValueError("train_tokenizer(texts): there is no text to learn from; check the data file and its column")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,  # decoding gives back the text, " ," included
    )
    tokenizer.save_pretrained(str(path))
    return tokenizer


def _trainer(vocab_size: int) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Save a tokenizer beside its model: the same bytes wherever and however it was loaded.

    transformers would note down that it came from a folder, and that the process was offline.
    """
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(str(path))


def loads_the_same(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> bool:
    """Whether the tokenizer, saved beside a model of this config, is loaded as it is.

    For a few model types (Qwen2 is one) transformers puts the family's own tokenizer class in place of the one saved:
    the same vocabulary, but text is split in another way.
    """
    step = max(len(tokenizer) // 200, 1)
    words = tokenizer.batch_decode([[i] for i in range(0, len(tokenizer), step)])
    probe = "The film's plot, naïve at 2,000 words:\n" + " ".join(word.strip() for word in words)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder)
    return bool(loaded(probe)["input_ids"] == tokenizer(probe)["input_ids"])
