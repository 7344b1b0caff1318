"""Train a tokenizer on the text of a data set, and save tokenizers beside their models."""

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_ppo.validate import integer

PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|endoftext|>"
MIN_VOCAB_SIZE = 256 + 2  # every byte and the two special tokens
FINGERPRINT = "trained_on.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")  # that training writes


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer and save it as a Hugging Face folder.

    It can encode any text, since every byte is a token. A text without a leading space gets one, so that a word has
    the same token at the start of a text and inside it (decoded text then begins with a space). The result depends
    only on the texts and ``vocab_size``.

    Args:
        texts: Training text.
        vocab_size: Number of tokens, including 256 bytes, ``<|pad|>`` and ``<|endoftext|>``; with little text the
            result has fewer.
        path: Folder to write; created if it does not exist.

    Raises:
        ValueError: ``vocab_size`` is too small for bytes and special tokens, or there is no text.

    >>> import tempfile
    >>> tokenizer = train_tokenizer(["a fine film", "a fine plot"], vocab_size=270, path=tempfile.mkdtemp())
    >>> tokenizer.tokenize("fine"), tokenizer.pad_token_id, tokenizer.eos_token_id
    (['Ġfine'], 0, 1)
    """
    integer("train_tokenizer", "vocab_size", vocab_size, at_least=MIN_VOCAB_SIZE)
    trained = ByteLevelBPETokenizer(add_prefix_space=True)
    special_tokens = [PAD_TOKEN, EOS_TOKEN]
    trained.train_from_iterator(texts, vocab_size, min_frequency=0, show_progress=False, special_tokens=special_tokens)
    if trained.get_vocab_size() == MIN_VOCAB_SIZE < vocab_size:
        raise ValueError("train_tokenizer(texts): there is no text; check the data file and its column")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained.to_str()),
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,  # decoding restores the text, " ," included
    )
    tokenizer.save_pretrained(str(path))
    return tokenizer


def train_tokenizer_once(where: str, texts: list[str], vocab_size: int, path: str) -> None:
    """Train and save a tokenizer, unless the folder has one that was trained on the same texts.

    A file beside the tokenizer says what it was trained on; it is complete only after the tokenizer is.

    Args:
        where: Argument to name in messages.
        texts: Training text.
        vocab_size: Number of tokens.
        path: Folder to write.

    Raises:
        ValueError: The folder has a tokenizer that this function did not write.
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    wanted = {"vocab_size": vocab_size, "texts": len(texts), "sha256": digest.hexdigest()}
    folder, marker = Path(path), Path(path, FINGERPRINT)
    found = _marker(marker)
    if found == wanted:
        return
    if found is None and any((folder / name).exists() for name in (FINGERPRINT, *TOKENIZER_FILES)):
        raise ValueError(
            f"{where}: {folder.resolve()} has a tokenizer of another origin; name it as `tokenizer`, or another path"
        )
    rank_zero_info(f"Training a tokenizer of {vocab_size} tokens on {len(texts)} texts: {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text("{}", encoding="utf-8")  # an interrupted training starts again
    train_tokenizer(texts, vocab_size, path)
    marker.write_text(json.dumps(wanted), encoding="utf-8")


def _marker(file: Path) -> dict[str, Any] | None:
    """What a tokenizer was trained on, empty while it is trained; None if the file is missing or another."""
    try:
        marker = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return marker if isinstance(marker, dict) and marker.keys() <= {"vocab_size", "texts", "sha256"} else None


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str | Path, *, keep_pad: bool = True) -> None:
    """Save a tokenizer beside its model; the bytes do not depend on how it was loaded and used.

    transformers would otherwise save that it came from a folder, that the process was offline, and the lengths that the
    last texts were cut or padded to.

    Args:
        tokenizer: The tokenizer.
        path: Folder.
        keep_pad: Also save a pad token that it did not have when it was loaded.
    """
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # set again with every text
        backend.no_truncation()
        backend.no_padding()
    pad = tokenizer.pad_token
    if keep_pad or tokenizer.init_kwargs.get("pad_token") is not None:
        tokenizer.save_pretrained(str(path))
        return
    tokenizer.pad_token = None
    tokenizer.save_pretrained(str(path))
    tokenizer.pad_token = pad


def gives_the_same_ids(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers have the same tokens, tokens to pad with aside, and split text alike."""
    if tokenizer is other:
        return True
    pads = {tokenizer.pad_token, other.pad_token}
    first, second = (
        {token: i for token, i in each.get_vocab().items() if token not in pads} for each in (tokenizer, other)
    )
    probe = _probe(tokenizer)
    ids = [each(probe, add_special_tokens=False, verbose=False)["input_ids"] for each in (tokenizer, other)]
    return first == second and bool(ids[0] == ids[1])


def _probe(tokenizer: PreTrainedTokenizerBase) -> str:
    """A text with many of the tokens that are not special."""
    step = max(len(tokenizer) // 200, 1)
    words = tokenizer.batch_decode([[i] for i in range(0, len(tokenizer), step)], skip_special_tokens=True)
    return "The film's plot, naïve at 2,000 words:\n" + " ".join(word.strip() for word in words)


def loads_the_same(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> bool:
    """Whether a tokenizer that is saved beside a model of this config loads unchanged.

    For a few model types (such as Qwen2) transformers loads the family's own tokenizer class instead of the saved one:
    the vocabulary is the same, but text is split in another way.
    """
    probe = _probe(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder)
    return bool(loaded(probe)["input_ids"] == tokenizer(probe)["input_ids"])
