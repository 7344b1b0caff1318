"""Bytes of each phase of an update, line by line."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lit_ppo.device import cpu_as_cuda
from lit_ppo.memory.job import Job, MicroBatch, full_bytes, gathered_bytes
from lit_ppo.memory.live import hollow_tensors
from lit_ppo.memory.optimizers import StateSizes, check_probe, describe
from lit_ppo.memory.sampling import RolloutTrace, distinct_prompts, resolved, trace_rollout
from lit_ppo.memory.shapes import Part, StandIns, local_bytes, ppo_parts
from lit_ppo.memory.trace import trace_scoring, trace_update
from lit_ppo.models.compute import halve_frozen, in_bfloat16
from lit_ppo.models.head import CHUNK_ELEMENTS, CUDA_CHUNK_ELEMENTS
from lit_ppo.models.positions import token_limit
from lit_ppo.rewards import reward_models

HELD, ROLLOUT, SCORE = "held", "rollout", "scoring"
ACTOR, CRITIC, CHECKPOINT, HOST = "update of the actor", "update of the critic", "checkpoint", "host"
LORA = "LoRA (--config lora), "
CUBLAS = 3 * 2**25  # of the main thread on two streams and of the backward; cards before Hopper take a quarter of it
WORKSPACE = "prompts, or the last token"
FULL_GRADIENTS = "full gradients between micro-batches"
PHASES = (ROLLOUT, SCORE, ACTOR, CRITIC, CHECKPOINT)


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
    """What each process of a run needs, and how it samples."""

    lines: list[Line]
    sampling: RolloutTrace | None = None  # None where an engine samples

    def sum(self, phase: str) -> int:
        """Bytes of a phase at its highest, with all that is held."""
        return sum(line.n_bytes for line in self.lines if line.phase in (HELD, phase))

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(PHASES, key=self.sum)

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
    for part in parts:
        if part.name == "critic" and job.critic_frozen:  # which happens once it is built as one that learns
            part.model.requires_grad_(False)
            part.extra = []
    lines = [*held(module, parts, job), *checkpoint(module, parts, job)]
    for part in parts:  # from here on as they compute
        if part.name in ("actor", "critic") and job.computing is torch.bfloat16:
            nn.Module.to(part.model, torch.bfloat16)
    with cpu_as_cuda(job.on_gpu), hollow_tensors(*(part.model for part in parts)):
        sampling = None if module.sampler is not None else sample(module, parts, job)
        lines += [*rollout(module, parts, job, sampling), *score(module, parts, job), *update(module, parts, job)]
    return Estimate([line for line in lines if line.n_bytes], sampling)


def held(module: Any, parts: list[Part], job: Job) -> Iterator[Line]:
    """What is there from the first update on: weights and optimizer states. Gradients are freed after each update."""
    n, divided = job.n_shards, _divided(job)
    if job.on_gpu:
        yield Line(HELD, "workspaces of cuBLAS", CUBLAS, "three of 32 MiB, as on a Hopper card")
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
        sizes = StateSizes(module.factories[part.name][0])
        check_probe(f"{type(module).__name__}({part.name}_optimizer", sizes, trained)
        yield Line(
            HELD, f"{part.name}: optimizer states", sizes.n_bytes(trained, n), f"{describe(sizes)}{divided}",
            f"{'' if frozen else LORA}strategy/fsdp2, an optimizer with fewer states",
        )  # fmt: skip
        if job.strategy == "ddp" and job.n_processes > 1:
            buckets = f"{part.name}: buckets of DDP"
            yield Line(HELD, buckets, local_bytes(trained), "a second copy of the gradients", "strategy/fsdp2")


def checkpoint(module: Any, parts: list[Part], job: Job) -> Iterator[Line]:
    """Full tensors of sharded models, one at a time; the first process collects them in its CPU memory."""
    if job.n_shards == 1:
        return
    trained = [x for part in parts for x in part.trained]
    largest = max((4 * x.numel() for x in trained), default=0)
    yield Line(CHECKPOINT, "the largest tensor in full", largest, "gathered one after the other", LORA)
    states = sum(StateSizes(module.factories[part.name][0]).n_bytes(part.trained) for part in parts if part.trained)
    collected = sum(4 * x.numel() for x in trained) + states
    phase = HOST if job.on_gpu else CHECKPOINT
    yield Line(phase, "the first process collects the checkpoint", collected, "weights and optimizer states in full")
    if job.on_gpu and job.offload_frozen:
        offloaded = sum(local_bytes(part.frozen, job.n_shards) for part in parts if not part.trained)
        yield Line(HOST, "each process keeps its shards of frozen models", offloaded, "offload_frozen")


def sample(module: Any, parts: list[Part], job: Job) -> RolloutTrace:
    """Sampling, traced."""
    rows, prompts = _sampled_at_once(module, job)
    return trace_rollout(parts[0].model, rows, prompts, job.prompt_tokens, resolved(module, job), job.autocast)


def _sampled_at_once(module: Any, job: Job) -> tuple[int, int]:
    """Responses, and their different prompts."""
    rows, length = -(-job.batch_size * module.samples_per_prompt // job.n_processes), MicroBatch.of(module, job).length
    size, tokens = module.rollout_limits["micro_batch_size"], module.rollout_limits["micro_batch_tokens"]
    rows = max(1, min(rows, size or rows, tokens // length if tokens else rows))
    return rows, distinct_prompts(rows, job.batch_size, module.samples_per_prompt, job.n_processes)


def rollout(module: Any, parts: list[Part], job: Job, traced: RolloutTrace | None) -> Iterator[Line]:
    """Sampling on top of what is held; nothing where an engine samples."""
    if traced is None:
        return
    rows, prompts = _sampled_at_once(module, job)
    cast = 0 if job.n_shards > 1 else traced.cast  # weights are gathered in autocast's dtype
    fewer = "rollout_batch_tokens or rollout_batch_size, generation.max_new_tokens, data.max_prompt_length"
    each = f"{rows} responses x {traced.tokens} tokens"
    yield _cast(ROLLOUT, cast)
    yield Line(ROLLOUT, "key-value cache", traced.cache, f"{each}, none of them ended", fewer)
    yield Line(ROLLOUT, WORKSPACE, traced.workspace, f"{prompts} prompts; the highest point, past the cache", fewer)
    if job.n_shards > 1:
        yield _gathered(ROLLOUT, full_bytes(parts[0].model, job), f"the full actor, {_in_full(job)}", job)


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
        full = sum(full_bytes(part.model, job) for part in rewards)
        blocks = max(gathered_bytes(part.model, job.computing) for part in parts)
        what = f"reward models in full, {_in_full(job)}" if full > blocks else f"two blocks and the head, {_dtype(job)}"
        yield _gathered(SCORE, max(full, blocks), what, job)


def update(module: Any, parts: list[Part], job: Job) -> Iterator[Line]:
    """Forward and backward of the largest micro-batch, of the actor first and then of the critic."""
    trained = [part for part in parts if part.name in ("actor", "critic") and part.trained]
    for part, phase in zip(trained, (ACTOR, CRITIC), strict=False):
        yield from _pass(module, part, phase, job)
        for before in trained[: trained.index(part)]:
            n_bytes = local_bytes(before.trained, job.n_shards)
            yield Line(phase, f"{before.name}: gradients", n_bytes, f"complete{_divided(job)}", f"{LORA}strategy/fsdp2")


def _pass(module: Any, part: Part, phase: str, job: Job) -> Iterator[Line]:
    """All micro-batches of one model."""
    micro, checkpointing = MicroBatch.of(module, job), module.model_settings.activation_checkpointing
    several = micro.per_step > 1  # the later ones find the gradients of those before
    traced = trace_update(
        part.model, micro.rows, micro.length, micro.new, job.autocast, is_critic=part.name == "critic",
        checkpointing=bool(checkpointing), has_gradients=several or job.n_shards > 1,
    )  # fmt: skip
    lower = "micro_batch_tokens or micro_batch_size" + ("" if checkpointing else ", activation_checkpointing")
    saved = "inputs of blocks" if checkpointing else "no activation checkpointing"
    if checkpointing is None and job.on_gpu:
        saved += "; it is turned on where this does not fit"
    kept = "precision bf16-mixed, " if job.autocast is None and job.computing is not torch.bfloat16 else ""
    gradients = local_bytes(part.trained, job.n_shards)
    if not (several or job.n_shards > 1):  # they come while activations go
        gradients = min(gradients, traced.peak - traced.cast - traced.activations - traced.head)
    workspace = traced.workspace - (0 if several or job.n_shards > 1 else gradients)
    made = "" if several else ", at the highest point of the only backward"
    lora = "" if part.frozen else LORA
    yield Line(phase, f"{part.name}: gradients", gradients, f"of trained weights{_divided(job)}{made}", lora)
    yield _cast(phase, traced.cast)
    yield Line(phase, "activations", traced.activations, f"{micro.sizes}, {saved}", f"{lower}; {kept}LoRA")
    yield Line(phase, "the head's chunks", traced.head, "probabilities kept for the backward", lower)
    if job.on_gpu and part.name == "actor":
        vocabulary = part.model.config.get_text_config().vocab_size
        logits = min(CUDA_CHUNK_ELEMENTS, micro.rows * micro.new * vocabulary) - CHUNK_ELEMENTS
        less = "less where under an eighth of the memory is free"
        yield Line(phase, "larger chunks on CUDA", max(logits, 0) * 22, less)
    yield Line(
        phase, "workspace of the backward", workspace, "with one layer's gradients before they are added", lower
    )  # fmt: skip
    if job.n_shards > 1:
        what = f"two blocks, and weights outside blocks, {_dtype(job)}"
        yield _gathered(phase, gathered_bytes(part.model, job.computing), what, job)
        if several and not job.every_micro_batch:
            full = sum(4 * x.numel() for x in part.trained)
            yield Line(
                phase, FULL_GRADIENTS, full, f"{micro.per_step} micro-batches in a step",
                "FSDP2Strategy(sync_every_micro_batch=True), LoRA",
            )  # fmt: skip


def _sources(module: Any) -> list[Any]:
    return list(dict.fromkeys([*reward_models(module.rewards), *reward_models(module.eval_rewards)]))


def _divided(job: Job) -> str:
    return f", divided over {job.n_shards} processes" if job.n_shards > 1 else ""


def _cast(phase: str, n_bytes: int) -> Line:
    lower = "FSDP2Strategy(mixed_precision=bfloat16) instead of bf16-mixed"
    return Line(phase, "copies of weights in bfloat16", n_bytes, "autocast makes them of float32 weights", lower)


def _gathered(phase: str, n_bytes: int, what: str, job: Job) -> Line:
    lower = "" if job.gathered else "FSDP2Strategy(mixed_precision=bfloat16)"
    return Line(phase, "gathered weights", n_bytes, what, lower)


def _dtype(job: Job) -> str:
    return f"in {str(job.computing).removeprefix('torch.')}"


def _in_full(job: Job) -> str:
    return "linear layers in bfloat16" if job.autocast is not None and job.gathered is None else _dtype(job)


def _lower_frozen(name: str) -> str:
    if name == "reference":
        return "reference_dtype bfloat16; LoRA (--config lora), which needs no copy"
    if name == "critic":
        return "strategy/fsdp2 on several processes"
    return "model_kwargs {dtype: bfloat16} of the RewardModel"
