"""A job's files, which both sides load: models with random weights, tokenizer, prompts, script.

Run in its own process, so that the process which starts the workers stays small: ``python -m benchmarks.files SPEC``.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.jobs import EOS, FIRST_WORD, PAD, UNK, Job, script

SEEDS = {"actor": 1, "reference": 2, "critic": 3, "reward": 4}  # different, so that KL and values are not 0


def write(job: Job, folder: Path) -> None:
    """Write everything that a worker needs.

    Args:
        job: The job.
        folder: Where to; gets ``actor``, ``reference``, ``critic``, ``reward``, ``prompts.jsonl`` and ``job.json``.
    """
    tokenizer = make_tokenizer(job.vocabulary)
    for name in SEEDS:
        make_model(job, name).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts, responses = script(job)
    lines = [json.dumps({"prompt": " ".join(f"w{i}" for i in prompt)}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "job.json").write_text(json.dumps({"job": asdict(job), "prompts": prompts, "responses": responses}))


def read(folder: Path) -> tuple[Job, list[list[int]], list[list[int]]]:
    """The job, its prompts and the responses to sample."""
    written = json.loads((folder / "job.json").read_text())
    return Job(**written["job"]), written["prompts"], written["responses"]


def make_tokenizer(vocabulary: int) -> Any:
    """Words ``w3 w4 ...`` separated by spaces, so that text and tokens map one to one: the reward model reads text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": PAD, "[EOS]": EOS, "[UNK]": UNK} | {f"w{i}": i for i in range(FIRST_WORD, vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", padding_side="left"
    )


def make_model(job: Job, name: str) -> Any:
    """One of the four models."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config

    auto = AutoModelForCausalLM if name in ("actor", "reference") else AutoModelForSequenceClassification
    config = GPT2Config(
        vocab_size=job.vocabulary, n_embd=job.hidden, n_layer=job.layers, n_head=job.heads,
        n_positions=job.longest_prompt + job.longest_response, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        num_labels=1, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(SEEDS[name])
    return auto.from_config(config)


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    write(Job(**spec["job"]), Path(spec["folder"]))
