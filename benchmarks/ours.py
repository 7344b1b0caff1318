"""The worker that runs LitPPO on a job and prints one JSON line: ``python -m benchmarks.ours SPEC``."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from transformers import LogitsProcessorList

import lit_ppo.ppo.module
import lit_ppo.ppo.optimize
from benchmarks import files
from benchmarks.jobs import Job, response_length
from benchmarks.measure import Clock, matmul_peak, memory, touch, update_flops
from benchmarks.scripted import Script, Scripted
from lit_ppo import LitPPO, PromptDataModule, RewardModel
from lit_ppo.callbacks import AdvantageNormalization, PPOCallback, ValueClipping

DEFAULTS = {"micro_batch_tokens": 4096, "attention": "sdpa", "reward_batch": 32, "environment": {}}
LEARNING_RATE = 3e-6


class Laps(L.Callback):
    """Ends a lap of the clock after each update, and measures the memory of the loaded models."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        touch(pl_module)
        self.loaded = memory()[0]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.clock.lap()
        self.clock.laps.clear()

    def on_train_batch_end(self, *args: Any) -> None:
        self.clock.lap()


class Capture(PPOCallback):
    """Keeps the numbers of one update for the comparison with the other side. It must be the last callback."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self.prompts = prompts
        self.arrays: dict[str, Any] = {}

    def on_advantages(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        ids = [row[mask].tolist() for row, mask in zip(experience.prompt_ids, experience.prompt_mask, strict=True)]
        order = [ids.index(prompt) for prompt in self.prompts]
        for name in ("logprobs", "ref_logprobs", "values", "advantages", "response_ids", "response_mask"):
            self.arrays[name] = getattr(experience, name)[order].cpu().numpy()

    def on_actor_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
        self.arrays.setdefault("policy_loss", []).append(losses["policy"].item())

    def on_critic_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
        self.arrays.setdefault("value_loss", []).append(losses["value"].item())


def make_module(folder: Path, job: Job, settings: dict[str, Any]) -> LitPPO:
    """LitPPO on the job's files, as a user would write it, with TRL's learning rate and without gradient clipping."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    return LitPPO(
        actor=str(folder / "actor"),
        critic=str(folder / "critic"),
        reference=str(folder / "reference"),
        rewards=RewardModel(str(folder / "reward"), batch_size=settings["reward_batch"]),
        generation={"max_new_tokens": job.longest_response},
        ppo_epochs=job.epochs,
        minibatch_size=job.minibatch_size,
        micro_batch_tokens=settings["micro_batch_tokens"],
        actor_optimizer=optimizer,
        critic_optimizer=optimizer,
        max_grad_norm=None,
        model_kwargs={"attn_implementation": settings["attention"]},
        seed=0,
    )


def follow_script(module: LitPPO, script: Script) -> None:
    """Make the actor sample the scripted tokens."""
    module.configure_model()
    model = module.actor.model
    generate = model.generate
    model.generate = lambda **kwargs: generate(**kwargs, logits_processor=LogitsProcessorList([Scripted(script)]))


def time_phases(module: LitPPO, clock: Clock) -> dict[str, int]:
    """Time the parts of an update; returns a count of optimizer steps, which the run increases."""
    clock.around(lit_ppo.ppo.module, "sample_responses", "rollout")
    clock.around(lit_ppo.ppo.module, "add_logprobs", "scoring")
    clock.around(module, "score", "scoring")
    for name in ("actor_forward", "critic_forward"):  # up to backward: the loss belongs to it
        clock.around(lit_ppo.ppo.optimize, name, "forward", after="forward", when=torch.is_grad_enabled)
    clock.around(module, "manual_backward", "backward")
    clock.around(module.optimization, "clip", "optimizer")
    clock.around(module, "step_optimizers", "optimizer")
    count, step = {"steps": 0}, module.step_optimizers

    def counted(*args: Any) -> None:
        step(*args)
        count["steps"] += 1

    module.step_optimizers = counted
    return count


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the updates."""
    torch.set_num_threads(spec["threads"])
    warnings.filterwarnings("ignore")
    folder, updates, settings = Path(spec["folder"]), spec["warmup"] + spec["updates"], DEFAULTS | spec["settings"]
    job, prompts, responses = files.read(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matmul = {"size": min(4096, 16 * job.hidden), "dtype": "bfloat16" if "bf16" in spec["precision"] else "float32"}
    before = matmul_peak(**matmul, device=device)
    module, clock = make_module(folder, job, settings), Clock()
    follow_script(module, Script(prompts, responses))
    count = time_phases(module, clock)
    laps, capture = Laps(clock), Capture(prompts)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=updates,
        precision=spec["precision"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AdvantageNormalization("batch"), ValueClipping(0.2), laps, capture],
    )
    trainer.fit(module, PromptDataModule(str(folder / "prompts.jsonl"), batch_size=job.prompts))
    peak = memory()[1]
    if spec["capture"]:
        np.savez(spec["capture"], **capture.arrays)
    lengths = [(len(p), response_length(r)) for p, r in zip(prompts, responses, strict=True)]
    return {
        "updates": clock.laps[spec["warmup"] :],
        "tokens": sum(response for _, response in lengths),
        "flops": update_flops(job.hidden, job.layers, job.vocabulary, lengths, job.epochs),
        "matmul": max(before, matmul_peak(**matmul, device=device)),
        "optimizer_steps": count["steps"] / updates,
        "loaded_bytes": laps.loaded,
        "peak_bytes": peak - laps.loaded,
        "settings": settings,
    }


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))))
