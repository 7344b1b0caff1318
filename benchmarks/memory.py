"""What a rank holds, by strategy and number of ranks: ``python -m benchmarks.memory`` prints the table (Linux)."""

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lit_ppo import FSDP2Strategy
from lit_ppo.parallel.ranks import n_ranks, rank
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny import make_causal_lm, make_tokenizer
from tests.helpers.toys import make_data, make_module, make_trainer

SHAPE = {"n_embd": 512, "n_layer": 12, "n_head": 8}  # 38 million parameters, 0.14 GiB
STRATEGIES = {1: ("auto",), 2: ("ddp", "fsdp2", "fsdp2, each")}


def resident(what: str) -> float:
    """Resident memory in MiB, now (``VmRSS``) or at its highest (``VmHWM``)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) / 1024


def forget_the_peak() -> None:
    """Count the highest from here on."""
    Path("/proc/self/clear_refs").write_text("5")


class Peak:
    """Highest resident memory between two calls."""

    def __init__(self) -> None:
        forget_the_peak()
        self.before = resident("VmRSS")

    def mib(self) -> float:
        """Over what it was at the beginning."""
        return resident("VmHWM") - self.before


def held(module: Any) -> float:
    """MiB of this rank's weights, gradients left out, and of its optimizer states."""
    tensors = [p for name in ("actor", "critic", "reference") for p in getattr(module, name).parameters()]
    optimizers = module.optimizers(use_pl_optimizer=False)
    tensors += [x for o in optimizers for state in o.state.values() for x in state.values() if x.ndim]
    local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum(x.numel() * x.element_size() for x in local) / 2**20


def measure(folder: Path, strategy: str) -> None:
    """One update; leaves what this rank used."""
    warnings.simplefilter("ignore")
    module: Any = make_module(
        folder / "actor",
        critic="actor",
        micro_batch_size=2,
        actor_optimizer=lambda params: torch.optim.AdamW(params, lr=1e-5, fused=True),
        critic_optimizer=lambda params: torch.optim.AdamW(params, lr=1e-5, fused=True),
    )
    used = {}
    build = module.configure_model

    def measured_build() -> None:
        if not module._built:
            peak = Peak()
            build()
            used["building"] = peak.mib()

    module.configure_model = measured_build
    made: dict[str, Any] = {"fsdp2, each": FSDP2Strategy(sync_every_micro_batch=True)}
    trainer = make_trainer(folder, devices=n_ranks(), strategy=made.get(strategy, strategy), max_steps=1)
    peak = Peak()
    trainer.fit(module, make_data(folder))
    used |= {"run": resident("VmHWM") - peak.before, "held": held(module)}
    torch.save(used, folder / f"{strategy}-{n_ranks()}-{rank()}.pt")
    dist.barrier()


def main() -> None:
    """Print the table."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system, and is seen to
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_causal_lm(folder / "actor", tokenizer=make_tokenizer(), n_positions=64, **SHAPE)
        print("| strategy | ranks | rank | weights and optimizer states | peak while building | peak of the run |")
        print("|---|---|---|---|---|---|")
        for n, strategies in STRATEGIES.items():
            for strategy in strategies:
                on_ranks(n, measure, folder, strategy, folder=folder / f"{strategy}{n}")
                for number in range(n):
                    used = torch.load(folder / f"{strategy}-{n}-{number}.pt")
                    cells = " | ".join(f"{used[key]:.0f} MiB" for key in ("held", "building", "run"))
                    print(f"| {strategy} | {n} | {number} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
