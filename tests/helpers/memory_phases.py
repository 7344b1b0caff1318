"""Bytes of the tensors that live in each phase of an update, counted while it runs."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lit_ppo import PromptDataModule
from lit_ppo.memory.estimate import ACTOR, CRITIC, ROLLOUT, SCORE, estimate
from lit_ppo.memory.job import Job
from lit_ppo.memory.live import Live
from lit_ppo.ppo import module as litppo
from lit_ppo.ppo import optimize
from tests.helpers.tiny import WORDS, make_causal_lm, write_rows
from tests.helpers.toys import make_module, make_trainer

PROMPT, NEW, BATCH = 56, 8, 32
PLACES = {
    ROLLOUT: (litppo, "sample_responses"),
    SCORE: (litppo, "add_logprobs"),
    ACTOR: (optimize, "_backward_actor"),
    CRITIC: (optimize, "_backward_critic"),
}
LORA = {"r": 8, "target_modules": "all-linear"}


def predicted_and_measured(
    folder: Path,
    family: str = "llama",
    shape: dict[str, Any] | None = None,
    precision: str = "32-true",
    device: str = "cpu",
    generation: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, tuple[int, int]]:
    """Bytes of each phase: of the estimate, and of the second update of a run, where optimizers have states.

    Args:
        folder: For the model and the run.
        family: Of the model.
        shape: Fields of its configuration.
        precision: The Trainer's.
        device: On ``cuda`` the allocator counts.
        generation: Further fields.
        **options: Of the module.
    """
    make_causal_lm(folder / "actor", family, **(shape or {}))
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(PROMPT)) for i in range(BATCH)]
    write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in texts])
    arguments: dict[str, Any] = {
        "critic": "actor", "ppo_epochs": 1, "minibatch_size": 32, "micro_batch_size": 16,
        "generation": {"max_new_tokens": NEW, **(generation or {})},
        **{f"{name}_optimizer": lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True) for name in ("actor", "critic")},
        **options,
    }  # fmt: skip
    fields = arguments["generation"]
    fields["min_new_tokens"] = fields["max_new_tokens"]
    module = make_module(folder / "actor", **arguments)
    on_gpu = device == "cuda"
    found = estimate(module, Job(batch_size=BATCH, prompt_tokens=PROMPT, precision=precision, on_gpu=on_gpu))
    measured: dict[str, int] = {}

    def counting(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if module.rollouts != (1 if phase == ROLLOUT else 2):
                return function(*args, **kwargs)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                result = function(*args, **kwargs)
                measured[phase] = max(measured.get(phase, 0), torch.cuda.max_memory_allocated())
                return result
            there = list(held(module))
            live = Live(there)
            with live:
                result = function(*args, **kwargs)
            measured[phase] = max(measured.get(phase, 0), n_bytes(there) + live.peak)
            return result

        return counted

    patches = [patch.object(where, name, counting(p, getattr(where, name))) for p, (where, name) in PLACES.items()]
    for each in patches:
        each.start()
    try:
        make_trainer(folder, max_steps=2, precision=precision, accelerator=device).fit(
            module, PromptDataModule(str(folder / "prompts.jsonl"), batch_size=BATCH, seed=0)
        )
    finally:
        for each in patches:
            each.stop()
    return {phase: (found.sum(phase), size) for phase, size in measured.items()}


def held(module: Any) -> Iterable[Tensor]:
    """Weights, gradients, optimizer states."""
    yield from module.parameters()
    yield from module.buffers()
    yield from (p.grad for p in module.parameters() if p.grad is not None)
    for optimizer in module.optimizers(use_pl_optimizer=False):
        yield from (x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages, each once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
