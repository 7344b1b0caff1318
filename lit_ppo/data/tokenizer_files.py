"""A tokenizer trained on a data set's text, written once."""

import hashlib
import json
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

FINGERPRINT = "trained_on.json"


def write_tokenizer_once(where: str, texts: list[str], vocab_size: int, path: str) -> None:
    """Trains a byte-level BPE tokenizer on texts and writes it, unless it lies there from the same texts.

    Args:
        where: Argument to name in messages.
        texts: What to train on.
        vocab_size: Number of tokens.
        path: Folder to write to.

    Raises:
        ValueError: The folder holds a tokenizer that this function has not written.
    """
    from lit_ppo.data.tokenization import train_tokenizer

    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    wanted = {"vocab_size": vocab_size, "texts": len(texts), "sha256": digest.hexdigest()}
    folder, marker = Path(path), Path(path, FINGERPRINT)
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == wanted:
        return
    if not marker.is_file() and (folder / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{where}: {folder.resolve()} holds a tokenizer from elsewhere; name it as `tokenizer`, or another path"
        )
    rank_zero_info(f"Training a tokenizer of {vocab_size} tokens on {len(texts)} texts: {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text("{}", encoding="utf-8")  # ours, and not finished
    train_tokenizer(texts, vocab_size, path)
    marker.write_text(json.dumps(wanted), encoding="utf-8")
