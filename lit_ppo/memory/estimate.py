"""Bytes of each phase of an update, line by line."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_ppo.memory.job import Job, MicroBatch, gathered_bytes
from lit_ppo.memory.live import hollow_tensors
from lit_ppo.memory.optimizers import StateSizes, check_probe, describe
from lit_ppo.memory.shapes import Part, StandIns, local_bytes, ppo_parts
from lit_ppo.memory.trace import trace_rollout, trace_scoring, trace_update
from lit_ppo.models.actor_critic import halve_frozen, in_bfloat16
from lit_ppo.models.head import CHUNK_ELEMENTS, CUDA_CHUNK_ELEMENTS
from lit_ppo.models.positions import token_limit
from lit_ppo.rewards import reward_models

HELD, ROLLOUT, SCORE, UPDATE = "held", "rollout", "score", "update"


@dataclass(frozen=True)
class Line:
    """One thing in memory.

    Args:
        phase: When it is there.
        name: What it is.
        n_bytes: Of one process.
        assumes: What the number rests on.
        lower: What makes it smaller.
    """

    phase: str
    name: str
    n_bytes: int
    assumes: str
    lower: str = ""


@dataclass(frozen=True)
class Estimate:
    """What each process of a run needs."""

    lines: list[Line]

    def sum(self, phase: str) -> int:
        """Bytes of a phase at its highest, with all that is held."""
        return sum(line.n_bytes for line in self.lines if line.phase in (HELD, phase))

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max((ROLLOUT, SCORE, UPDATE), key=self.sum)

    @property
    def peak(self) -> int:
        """Bytes that the run needs."""
        return self.sum(self.largest)


def estimate(module: Any, job: Job, stand_ins: StandIns | None = None) -> Estimate:
    """What a run of a LitPPO will need.

    Args:
        module: Before it has built its models; it is not changed.
        job: Data and Trainer.
        stand_ins: Configurations of models that do not exist yet, by path.

    Raises:
        ValueError: A model's configuration cannot be read.
    """
    parts = ppo_parts(module, stand_ins or {})
    if job.precision == "64-true":
        for part in parts:
            nn.Module.to(part.model, torch.float64)
    by_default = module.model_settings.reference_dtype is None
    for part in parts if job.precision == "bf16-true" else ():
        if part.name in ("actor", "critic") or (part.name == "reference" and by_default):
            in_bfloat16(part.model)
    halves = job.on_gpu and job.autocast is not None and job.n_shards == 1
    if halves and by_default:
        for part in parts:
            halve_frozen(part.model)
    lines = [*held(module, parts, job)]
    for part in parts:  # from here on as they compute
        if part.name in ("actor", "critic") and job.computing is torch.bfloat16:
            nn.Module.to(part.model, torch.bfloat16)
    with hollow_tensors(*(part.model for part in parts)):
        lines += [*rollout(module, parts, job), *score(module, parts, job), *update(module, parts, job)]
    return Estimate([line for line in lines if line.n_bytes])


def held(module: Any, parts: list[Part], job: Job) -> Iterator[Line]:
    """What is there from the first update on: weights, gradients, optimizer states."""
    n, divided = job.n_shards, f", divided over {job.n_shards} processes" if job.n_shards > 1 else ""
    for part in parts:
        trained, frozen = part.trained, part.frozen
        dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in part.model.parameters()})
        dtype = " and ".join(dtypes)
        count = sum(x.numel() for x in (*trained, *frozen))
        if not trained:
            name, lower = f"{part.name}: frozen weights", _lower_frozen(part.name)
            offloaded = job.offload_frozen and job.on_gpu and n > 1
            n_bytes = 0 if offloaded else local_bytes(frozen, n)
            yield Line(HELD, name, n_bytes, f"{count:,} in {dtype}{divided}", lower)
            continue
        kinds = f"{count:,} in {dtype}" + (f", {sum(x.numel() for x in trained):,} trained" if frozen else "")
        yield Line(
            HELD, f"{part.name}: weights", local_bytes([*trained, *frozen], n), kinds + divided,
            "strategy/fsdp2 on more processes" if n > 1 else "strategy/fsdp2 on several processes",
        )  # fmt: skip
        lora = "" if frozen else "LoRA (--config lora), "
        yield Line(
            HELD, f"{part.name}: gradients", local_bytes(trained, n),
            f"of trained weights{divided}; kept until the next update", f"{lora}strategy/fsdp2",
        )  # fmt: skip
        sizes = StateSizes(module.factories[part.name][0])
        check_probe(f"{type(module).__name__}({part.name}_optimizer", sizes, trained)
        states = sizes.n_bytes(trained, n)
        yield Line(
            HELD, f"{part.name}: optimizer states", states, f"{describe(sizes)}{divided}",
            f"{lora}strategy/fsdp2, an optimizer with fewer states",
        )  # fmt: skip
        if job.strategy == "ddp" and job.n_processes > 1:
            buckets = f"{part.name}: buckets of DDP"
            yield Line(HELD, buckets, local_bytes(trained), "a second copy of the gradients", "strategy/fsdp2")


def rollout(module: Any, parts: list[Part], job: Job) -> Iterator[Line]:
    """Sampling on top of what is held."""
    actor, micro = parts[0].model, MicroBatch.of(module, job)
    rows = -(-job.batch_size * module.samples_per_prompt // job.n_processes)
    size, tokens = module.rollout_limits["micro_batch_size"], module.rollout_limits["micro_batch_tokens"]
    rows = max(1, min(rows, size or rows, tokens // micro.length if tokens else rows))
    traced = trace_rollout(actor, rows, job.prompt_tokens, micro.new, job.autocast)
    fewer = "rollout_batch_tokens or rollout_batch_size, generation.max_new_tokens, data.max_prompt_length"
    each = f"{rows} responses x {micro.length} tokens"
    yield _cast(ROLLOUT, traced.cast)
    yield Line(ROLLOUT, "key-value cache", traced.cache, f"{each}, none of them ended", fewer)
    yield Line(ROLLOUT, "prompts, or the last token", traced.workspace, "the higher of the two, past the cache", fewer)
    if job.n_shards > 1:
        full = gathered_bytes(actor, job.computing)[1]
        yield _gathered(ROLLOUT, full, "the full actor", job)


def score(module: Any, parts: list[Part], job: Job) -> Iterator[Line]:
    """Log-probs, values and rewards: one forward at a time."""
    micro = MicroBatch.of(module, job)
    rewards = [part for part in parts if part.name.startswith("reward")]
    n_bytes, what = 0, ""
    for part in parts:
        kind = {"actor": "head", "reference": "head", "critic": "critic"}.get(part.name, "classifier")
        if kind == "classifier" or (part is not parts[0] and part.path == parts[0].path):
            continue  # the latter needs no more than the actor
        peak = trace_scoring(part.model, micro.rows, micro.length, micro.new, job.autocast, kind)
        n_bytes, what = max((n_bytes, what), (peak, f"{part.name}, {micro.sizes}"))
    for part, source in zip(rewards, _sources(module), strict=True):
        length = min(micro.length, token_limit(part.model) or micro.length)
        rows = source.batch_size if source.batch_tokens is None else max(1, source.batch_tokens // length)
        peak = trace_scoring(part.model, rows, length, micro.new, job.autocast, "classifier")
        n_bytes, what = max((n_bytes, what), (peak, f"{part.name}, {rows} x {length} tokens"))
    lower = "micro_batch_tokens; batch_size or batch_tokens of the RewardModel"
    yield Line(SCORE, "largest forward", n_bytes, what, lower)
    if job.n_shards > 1:
        full = sum(gathered_bytes(part.model, job.gathered or part.model.dtype)[1] for part in rewards)
        blocks = max(gathered_bytes(part.model, job.computing)[0] for part in parts)
        yield _gathered(SCORE, max(full, blocks), "reward models in full, of others two blocks and the head", job)


def update(module: Any, parts: list[Part], job: Job) -> Iterator[Line]:
    """Forward and backward of the largest micro-batch."""
    micro = MicroBatch.of(module, job)
    checkpointing = module.model_settings.activation_checkpointing
    trained = [part for part in parts if part.name in ("actor", "critic")]
    traces = {}
    for part in trained:
        if part.name == "critic" and part.path == parts[0].path and bool(part.frozen) == bool(parts[0].frozen):
            continue  # it needs no more than the actor
        traces[part.name] = trace_update(
            part.model, micro.rows, micro.length, micro.new, job.autocast,
            is_critic=part.name == "critic", checkpointing=bool(checkpointing),
        )  # fmt: skip
    name = max(traces, key=lambda name: traces[name].peak)
    lower = "micro_batch_tokens or micro_batch_size" + ("" if checkpointing else ", activation_checkpointing")
    saved = "inputs of blocks" if checkpointing else "no activation checkpointing"
    if checkpointing is None and job.on_gpu:
        saved += "; it is turned on where this does not fit"
    kept = "precision bf16-mixed, " if job.autocast is None and job.computing is not torch.bfloat16 else ""
    yield _cast(UPDATE, traces[name].cast)
    yield Line(
        UPDATE,
        f"activations of the {name}",
        traces[name].activations,
        f"{micro.sizes}, {saved}",
        f"{lower}; {kept}LoRA",
    )
    yield Line(UPDATE, "the head's chunks", traces[name].head, "probabilities kept for the backward", lower)
    if job.on_gpu:
        vocabulary = parts[0].model.config.get_text_config().vocab_size
        logits = min(CUDA_CHUNK_ELEMENTS, micro.rows * micro.new * vocabulary) - CHUNK_ELEMENTS
        yield Line(
            UPDATE, "larger chunks on CUDA", max(logits, 0) * 22, "less where under an eighth of the memory is free"
        )
    yield Line(
        UPDATE, "workspace of the backward", traces[name].workspace,
        "with one layer's gradients before they are added", lower,
    )  # fmt: skip
    if job.n_shards > 1:
        blocks = max(gathered_bytes(part.model, job.computing)[0] for part in parts)
        yield _gathered(UPDATE, blocks, "two blocks, and weights outside blocks", job)
        if micro.per_step > 1 and not job.every_micro_batch:
            full = sum(4 * x.numel() for part in trained for x in part.trained)
            yield Line(
                UPDATE, "full gradients between micro-batches", full, f"{micro.per_step} micro-batches in a step",
                "FSDP2Strategy(sync_every_micro_batch=True), LoRA",
            )  # fmt: skip


def _sources(module: Any) -> list[Any]:
    return list(dict.fromkeys([*reward_models(module.rewards), *reward_models(module.eval_rewards)]))


def _cast(phase: str, n_bytes: int) -> Line:
    lower = "FSDP2Strategy(mixed_precision=bfloat16) instead of bf16-mixed"
    return Line(phase, "copies of weights in bfloat16", n_bytes, "autocast makes them of float32 weights", lower)


def _gathered(phase: str, n_bytes: int, what: str, job: Job) -> Line:
    dtype = str(job.computing).removeprefix("torch.")
    lower = "" if job.gathered else "FSDP2Strategy(mixed_precision=bfloat16)"
    return Line(phase, "gathered weights", n_bytes, f"{what}, in {dtype}", lower)


def _lower_frozen(name: str) -> str:
    if name == "reference":
        return "reference_dtype bfloat16; LoRA (--config lora), which needs no copy"
    return "model_kwargs {dtype: bfloat16} of the RewardModel"
