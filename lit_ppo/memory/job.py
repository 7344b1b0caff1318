"""The sizes of a run that decide what it needs."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lit_ppo.callbacks.advantage_regression import AdvantageRegression
from lit_ppo.parallel.sharding import blocks, linear_layers

PROMPT = 512  # tokens of a prompt where the data have no limit
PRECISIONS = {"bf16-mixed": "bf16-mixed", "bf16": "bf16-mixed", "bf16-true": "bf16-true"}
PRECISIONS |= {"64-true": "64-true", "64": "64-true"}
Strategy = Literal["single", "ddp", "fsdp2"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an estimate needs to know beside the module.

    Args:
        batch_size: Prompts of an update, over all processes.
        prompt_tokens: Of the longest prompt.
        precision: The Trainer's.
        n_processes: One for each device.
        strategy: How they share the work.
        gathered: Dtype in which FSDP2 gathers weights and computes.
        every_micro_batch: FSDP2 reduces gradients after each micro-batch.
        offload_frozen: FSDP2 keeps the shards of frozen models in CPU memory.
        on_gpu: The devices are GPUs.
        critic_frozen: The critic is not trained (``LeastSquaresCritic``).
        replay: Earlier responses for each new one in an optimizer step (``AdvantageRegression``).
    """

    batch_size: int
    prompt_tokens: int
    precision: str = "32-true"
    n_processes: int = 1
    strategy: Strategy = "single"
    gathered: torch.dtype | None = None
    every_micro_batch: bool = False
    offload_frozen: bool = False
    on_gpu: bool = False
    critic_frozen: bool = False
    replay: int = 0

    @property
    def n_shards(self) -> int:
        """Processes that share one copy of the models."""
        return self.n_processes if self.strategy == "fsdp2" else 1

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of products where it is not that of the weights."""
        return torch.bfloat16 if self.precision in ("bf16-mixed", "bf16-true") else None

    @property
    def computing(self) -> torch.dtype:
        """Dtype of the weights while they are used."""
        dtype = torch.float64 if self.precision == "64-true" else torch.float32
        return self.gathered or dtype if self.strategy == "fsdp2" else dtype


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a process."""

    rows: int
    length: int
    new: int
    per_step: int

    @classmethod
    def of(cls, module: Any, job: Job) -> "MicroBatch":
        """All responses of full length, as the limits of the module divide a minibatch."""
        new = int(module.model_settings.generation["max_new_tokens"])
        length = job.prompt_tokens + new
        size, tokens = module.limits["micro_batch_size"], module.limits["micro_batch_tokens"]
        minibatch = min(module.minibatch_size, job.batch_size * module.samples_per_prompt) * (1 + job.replay)
        share = -(-minibatch // job.n_processes)
        most = share if size is None else size
        rows = max(1, min(share, most if tokens is None else tokens // length))
        return cls(rows, length, new, -(-share // rows))

    @property
    def sizes(self) -> str:
        """In words."""
        return f"{self.rows} x {self.length} tokens"


def gathered_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that FSDP2 gathers of a model for a forward and a backward: two blocks, and all outside blocks."""
    total = sum(p.numel() for p in model.parameters())
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    return (total - sum(sizes) + 2 * max(sizes, default=0)) * dtype.itemsize


def full_bytes(model: nn.Module, job: Job) -> int:
    """Bytes of a model that is gathered in full, to sample or to score."""
    if job.gathered is not None:
        return sum(p.numel() for p in model.parameters()) * job.gathered.itemsize
    linear = set() if job.autocast is None else {p for x in linear_layers(model) for p in x.parameters(recurse=False)}
    return sum(p.numel() * (2 if p in linear else p.element_size()) for p in model.parameters())


def job_of(config: dict[str, Any], most_positions: int | None = None) -> tuple[Job, list[str]]:
    """The job of a configuration, and what had to be assumed.

    Args:
        config: The full configuration, as plain values.
        most_positions: Tokens that the actor has positions for; None: no limit.
    """
    trainer = config["trainer"]
    data = (config.get("data") or {}).get("init_args") or {}
    new = int(config["model"]["init_args"]["generation"]["max_new_tokens"])
    notes = []
    accelerator = trainer.get("accelerator") or "auto"
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    n_devices = _count(trainer.get("devices"), on_gpu=on_gpu)
    n_processes = n_devices * int(trainer.get("num_nodes") or 1)
    if trainer.get("devices") in (None, "auto", -1, "-1"):
        notes.append(f"trainer.devices is auto: counted {n_devices} on this machine")
    prompt = data.get("max_prompt_length")
    if prompt is None:
        prompt = min(PROMPT, max(1, (most_positions or PROMPT + new) - new))
        notes.append(f"data.max_prompt_length is not set: assumed prompts of up to {prompt} tokens")
    batch_size = data.get("batch_size")
    if not isinstance(batch_size, int):
        batch_size = int(config["model"]["init_args"].get("minibatch_size") or 32)
        notes.append(f"the data name no batch_size: assumed {batch_size} prompts in an update")
    strategy, options = _strategy(trainer.get("strategy"), n_processes)
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    given = {str(one.get("class_path")).rpartition(".")[2]: one.get("init_args") or {} for one in callbacks}
    regression = given.get("AdvantageRegression")
    job = Job(
        batch_size=batch_size,
        prompt_tokens=int(prompt),
        precision=PRECISIONS.get(str(trainer.get("precision")), "32-true"),
        n_processes=n_processes,
        strategy=strategy,
        gathered=torch.bfloat16 if "bfloat16" in str(options.get("mixed_precision")) else None,
        every_micro_batch=bool(options.get("sync_every_micro_batch")),
        offload_frozen=bool(options.get("offload_frozen")),
        on_gpu=on_gpu,
        critic_frozen="LeastSquaresCritic" in given,
        replay=0 if regression is None else AdvantageRegression(**regression).replay,
    )
    for name in sorted({"AdvantageRegression", "CounterfactualActions"} & given.keys()):
        notes.append(f"the other tokens of {name} are not counted")
    if job.replay:
        notes.append("the earlier responses of AdvantageRegression, in host memory, are not counted")
    return job, notes


def _count(devices: Any, *, on_gpu: bool) -> int:
    """Devices of one machine."""
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([each for each in devices.split(",") if each.strip()])
    if devices in (None, "auto", -1, "-1"):
        return max(torch.cuda.device_count(), 1) if on_gpu else 1
    return int(devices)


def _strategy(given: Any, n_processes: int) -> tuple[Strategy, dict[str, Any]]:
    """Which strategy, and its arguments."""
    name = given.get("class_path", "") if isinstance(given, dict) else str(given)
    if "fsdp" in name.lower():
        return "fsdp2", (given.get("init_args") or {}) if isinstance(given, dict) else {}
    return ("ddp" if n_processes > 1 else "single"), {}
