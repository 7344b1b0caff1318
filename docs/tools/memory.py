"""Print the tables of "Memory by model size": ``python -m docs.tools.memory``; ``--write`` puts them into the page.

They come from the functions behind ``lit-ppo memory``. Nothing is run, and nothing is downloaded: the shapes of the
models are below, as their ``config.json`` has them.
"""

import argparse
import copy
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from lit_ppo import LitPPO, RewardModel
from lit_ppo.memory.estimate import (
    CHECKPOINT,
    CRITIC,
    FULL_GRADIENTS,
    HELD,
    HOST,
    PHASES,
    ROLLOUT,
    WORKSPACE,
    Estimate,
    Line,
    estimate,
    held,
)
from lit_ppo.memory.job import Job
from lit_ppo.memory.shapes import Part, hollow, ppo_parts

PAGE = Path(__file__).resolve().parents[1] / "explanation" / "memory_by_size.md"


def _qwen(hidden: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int, *, tied: bool) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip


def _llama(hidden: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=False, max_position_embeddings=4096,
    )  # fmt: skip


MODELS: dict[str, Any] = {
    "0.5B": _qwen(896, 24, 14, 2, 4864, 151936, tied=True),  # Qwen2.5
    "1.5B": _qwen(1536, 28, 12, 2, 8960, 151936, tied=True),
    "3B": _qwen(2048, 36, 16, 2, 11008, 151936, tied=True),
    "7B": _qwen(3584, 28, 28, 4, 18944, 152064, tied=False),
    "8B": _llama(4096, 32, 32, 8, 14336, 128256),  # Llama 3.1
    "13B": _llama(5120, 40, 40, 40, 13824, 32000),  # Llama 2
    "70B": _llama(8192, 80, 64, 8, 28672, 128256),  # Llama 3.1
}
ROWS, NEW, PROMPT = 64, 512, 512
LAYERS = (8, 10)  # with which a model is traced
PROCESSES = (1, 2, 8, 64)
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
KINDS = {"all weights": None, "LoRA": LORA}
PRECISIONS = ("32-true", "bf16-mixed")


@cache
def traced(size: str, kind: str, precision: str, n: int) -> tuple[LitPPO, list[Part], Job, Estimate]:
    """The job of one cell; traced with few layers, since each further one adds the same bytes."""
    in_bf16 = precision == "bf16-mixed"
    job = Job(
        # under FSDP2, weights are gathered in bfloat16, and there is no autocast
        batch_size=ROWS, prompt_tokens=PROMPT, precision=precision if n == 1 else "32-true", n_processes=n, on_gpu=True,
        strategy="fsdp2" if n > 1 else "single", gathered=torch.bfloat16 if n > 1 and in_bf16 else None,
    )  # fmt: skip
    module = _module(size, kind, precision)
    parts, layers = ppo_parts(module, MODELS), MODELS[size].num_hidden_layers
    few, more = (estimate(module, job, {size: _with_layers(MODELS[size], n)}) for n in LAYERS)
    assert few.sampling is not None
    assert more.sampling is not None

    def at_all(of_few: int, of_more: int) -> int:
        return of_few + (of_more - of_few) * (layers - LAYERS[0]) // (LAYERS[1] - LAYERS[0])

    named = _by_name(more)
    lines = {key: replace(x, n_bytes=at_all(x.n_bytes, named[key].n_bytes)) for key, x in _by_name(few).items()}
    # which of its three points is the highest depends on the number of layers
    highest = max(map(at_all, few.sampling.peaks, more.sampling.peaks))
    workspace = highest - at_all(few.sampling.cache, more.sampling.cache)
    lines[ROLLOUT, WORKSPACE] = replace(lines[ROLLOUT, WORKSPACE], n_bytes=workspace)
    return module, parts, job, Estimate(list(lines.values()))


def _module(size: str, kind: str, precision: str) -> LitPPO:
    frozen: Any = "bfloat16" if precision == "bf16-mixed" else "float32"
    adapter = KINDS[kind]
    return LitPPO(
        size, rewards=RewardModel(size, batch_size=8, model_kwargs={"dtype": frozen}), actor_lora=adapter,
        critic_lora=adapter, reference_dtype="float32" if adapter else frozen,
        generation={"max_new_tokens": NEW}, minibatch_size=ROWS, micro_batch_size=1, activation_checkpointing=True,
    )  # fmt: skip


def _by_name(found: Estimate) -> dict[tuple[str, str], Line]:
    return {(line.phase, line.name): line for line in found.lines}


def _with_layers(config: Any, n: int) -> Any:
    few = copy.deepcopy(config)
    few.num_hidden_layers, few.layer_types = n, (getattr(config, "layer_types", None) or [])[:n] or None
    return few


@cache
def counted(size: str, kind: str, precision: str, n: int) -> Estimate:
    """The estimate of one cell. Jobs on more processes differ in their shards and in the rows that each samples."""
    start = 1 if n == 1 and precision == "bf16-mixed" else 2
    module, parts, job, found = traced(size, kind, precision, start)
    job = replace(job, n_processes=n, strategy="fsdp2" if n > 1 else "single")
    lines = [line for line in found.lines if line.phase != HELD]
    if n == 1:
        single = ("gathered weights", FULL_GRADIENTS)
        lines = [line for line in lines if line.name not in single and line.phase not in (CHECKPOINT, HOST)]
    if n >= ROWS:  # one micro-batch in a step
        lines = [line for line in lines if line.name != FULL_GRADIENTS]
    divided = ("key-value cache", WORKSPACE, "actor: gradients", "critic: gradients")
    lines = [replace(x, n_bytes=x.n_bytes * start // n) if x.name in divided else x for x in lines]
    return Estimate([*held(module, parts, job), *lines])


def by_size() -> str:
    """Peak of each process."""
    rows = ["| model | trained | precision | 1 | 2 | 8 | 64 |", "|---|---|---|---|---|---|---|"]
    for size in MODELS:
        for kind in KINDS:
            for precision in PRECISIONS:
                cells = [f"{counted(size, kind, precision, n).peak / 2**30:.0f}" for n in PROCESSES]
                rows.append(f"| {size} | {kind} | {precision} | {' | '.join(cells)} |")
    return "\n".join(rows)


JOBS = (("7B", 1), ("7B", 8), ("70B", 64))


def phases() -> str:
    """Phases of a few jobs."""
    names = [
        "held",
        "rollout",
        "scoring",
        "actor",
        "critic",
        "critic, reduced early",
        "checkpoint",
        "first process' CPU",
    ]
    rows = [f"| model | trained | GPUs | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for size, n in JOBS:
        for kind in KINDS:
            found = counted(size, kind, "bf16-mixed", n)
            early = Estimate([line for line in found.lines if line.name != FULL_GRADIENTS])
            host = sum(line.n_bytes for line in found.lines if line.phase == HOST)
            sums = [found.sum(phase) for phase in (HELD, *PHASES)]
            sums = [*sums[:5], early.sum(CRITIC), sums[5], host]
            cells = [f"{n_bytes / 2**30:.0f}" if n_bytes and (n > 1 or i < 5) else "" for i, n_bytes in enumerate(sums)]
            rows.append(f"| {size} | {kind} | {n} | {' | '.join(cells)} |")
    return "\n".join(rows)


def traffic(size: str, n: int, *, lora: bool, minibatches: int, micro_batches: int) -> dict[str, float]:
    """GB that each process receives in an update of one epoch, by phase, with FSDP2 in bfloat16.

    A gathered model of w bytes costs (n - 1) / n * w, and so does a reduced gradient.

    Args:
        size: Of all four models.
        n: Processes.
        lora: Actor and critic train an adapter; the actor without it is the reference.
        minibatches: Optimizer steps.
        micro_batches: Of each process in a step.
    """
    weights = _weights(size)
    share, bf16, fp32 = (n - 1) / n / 1e9, 2 * weights, 4 * weights
    forwards = minibatches * micro_batches
    trained = 2 * (_adapter(size) if lora else fp32)  # of actor and critic
    numbers = ROWS * NEW * (3 * 4 + 5)  # log-probs, reference log-probs, values; ids as Python's integers
    return {
        "rollout": share * bf16,
        "scoring": share * (bf16 + 3 * bf16 * forwards),  # reward model once; actor, reference, critic each time
        "update: weights": share * 2 * 2 * bf16 * forwards,  # forward, backward; actor, critic
        "update: gradients": share * trained * minibatches,
        "reduced early": share * trained * forwards,
        "experience": share * numbers,
    }


@cache
def _adapter(size: str) -> int:
    """Bytes of an adapter's gradients."""
    model = ppo_parts(_module(size, "LoRA", "bf16-mixed"), MODELS)[0].model
    return sum(4 * p.numel() for p in model.parameters() if p.requires_grad)


@cache
def _weights(size: str) -> int:
    return sum(p.numel() for p in hollow(AutoModelForCausalLM, MODELS[size], torch.float32, {}).parameters())


def traffic_table() -> str:
    """GB of each phase."""
    rows = []
    for size, n in JOBS[1:]:
        for kind, lora in (("all weights", False), ("LoRA", True)):
            moved = traffic(size, n, lora=lora, minibatches=1, micro_batches=ROWS // n)
            if not rows:
                rows = [f"| model | trained | GPUs | {' | '.join(moved)} |", "|---" * (3 + len(moved)) + "|"]
            cells = [f"{gb:,.0f}" if gb >= 10 else f"{gb:.2g}" for gb in moved.values()]
            rows.append(f"| {size} | {kind} | {n} | {' | '.join(cells)} |")
    return "\n".join(rows)


TABLES = {"by-size": by_size, "phases": phases, "traffic": traffic_table}


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="Put them into the page.")
    write = parser.parse_args().write
    page = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        table = make()
        print(table, flush=True)
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = between.sub(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", page)
    if write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
