"""One small job in a process of its own: predicted and measured memory.

``python -m tests.helpers.memory_run FOLDER '{"precision": "bf16-mixed"}'`` prints both in bytes (Linux).
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lit_ppo import PromptDataModule
from lit_ppo.memory.estimate import estimate
from lit_ppo.memory.job import Job
from tests.helpers.tiny import WORDS, make_causal_lm, make_tokenizer, write_rows
from tests.helpers.toys import make_module, make_trainer

SHAPE = {
    "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1408, "max_position_embeddings": 256,
}  # 24 million weights  # fmt: skip
PROMPT, NEW, BATCH = 56, 8, 8


def measured_run(folder: Path, **options: Any) -> tuple[int, int]:
    """Bytes that were predicted, and by which the resident memory of a process grew.

    Args:
        folder: For the model and the run.
        **options: Of the module; ``precision`` and ``lora``.
    """
    command = [sys.executable, "-m", __spec__.name, str(folder), json.dumps(options)]
    # what is freed goes back to the system at once
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    predicted, measured = map(int, done.stdout.split()[-2:])
    return predicted, measured


def resident(what: str) -> int:
    """Resident memory, now (``VmRSS``) or at its highest (``VmHWM``)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) * 1024


def _run(folder: Path, precision: str = "32-true", lora: bool = False, **options: Any) -> None:
    warnings.simplefilter("ignore")
    adapter = {"r": 8, "target_modules": "all-linear"} if lora else None
    arguments: dict[str, Any] = {
        "critic": "actor", "actor_lora": adapter, "critic_lora": adapter, "ppo_epochs": 1, "minibatch_size": 8,
        "micro_batch_size": 4, "generation": {"max_new_tokens": NEW, "min_new_tokens": NEW},
        **{f"{name}_optimizer": lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True) for name in ("actor", "critic")},
        **options,
    }  # fmt: skip
    write_rows(folder / "prompts.jsonl", [{"prompt": " ".join(WORDS[:8] * (PROMPT // 8))} for _ in range(BATCH)])

    def job(steps: int, model: str) -> Any:
        module = make_module(folder / model, **arguments)
        data = PromptDataModule(str(folder / "prompts.jsonl"), batch_size=BATCH, seed=0)
        trainer = make_trainer(folder, max_steps=steps, precision=precision)
        return module, data, trainer

    module, data, trainer = job(1, "warm")  # libraries load and threads start
    trainer.fit(module, data)
    del module, data, trainer
    module, data, trainer = job(1, "actor")
    predicted = estimate(module, Job(batch_size=BATCH, prompt_tokens=PROMPT, precision=precision)).peak
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # count the highest from here on
    trainer.fit(module, data)
    print(predicted, resident("VmHWM") - before)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    for model, shape in (("actor", SHAPE), ("warm", {"max_position_embeddings": 256})):
        make_causal_lm(where / model, "llama", tokenizer=make_tokenizer(), **shape)
    _run(where, **json.loads(sys.argv[2]))
