"""The worker that runs TRL's PPOTrainer on a job and prints one JSON line: ``python -m benchmarks.trl_side SPEC``.

Runs in an environment of TRL's own, without lit_ppo.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks import files
from benchmarks.jobs import Job, response_length
from benchmarks.measure import Clock, memory, touch, update_flops
from benchmarks.scripted import Script, scripted_multinomial

# None: whatever PPOConfig says
DEFAULTS = {"per_device": 8, "rollout_batch": None, "checkpointing": None, "attention": None, "environment": {}}


class Laps(TrainerCallback):
    """Ends a lap of the clock after each update."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.lap()
        self.clock.laps.clear()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.lap()


def make_config(job: Job, folder: Path, updates: int, precision: str, settings: dict[str, Any]) -> PPOConfig:
    """TRL's defaults, except for what the job fixes."""
    chosen = {"local_rollout_forward_batch_size": "rollout_batch", "gradient_checkpointing": "checkpointing"}
    return PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=settings["per_device"],
        gradient_accumulation_steps=job.prompts // settings["per_device"],
        num_ppo_epochs=job.epochs,
        num_mini_batches=job.minibatches,
        response_length=job.longest_response,
        total_episodes=updates * job.prompts,
        stop_token="eos",
        temperature=1.0,
        lr_scheduler_type="constant",
        bf16=precision == "bf16-mixed",
        use_cpu=not torch.cuda.is_available(),  # TrainingArguments refuses bf16 without a GPU otherwise
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{name: settings[key] for name, key in chosen.items() if settings[key] is not None},
    )


def make_trainer(folder: Path, job: Job, config: PPOConfig, attention: str | None, laps: Laps) -> PPOTrainer:
    """PPOTrainer on the job's files; its batches are the job's prompts, in the script's order."""
    _, prompts, _ = files.read(folder)
    kwargs = {"dtype": torch.float32} | ({"attn_implementation": attention} if attention else {})
    models = {
        name: auto.from_pretrained(folder / name, **kwargs)
        for name, auto in {
            "actor": AutoModelForCausalLM,
            "reference": AutoModelForCausalLM,
            "critic": AutoModelForSequenceClassification,
            "reward": AutoModelForSequenceClassification,
        }.items()
    }
    tokenizer = AutoTokenizer.from_pretrained(folder / "actor", padding_side="left")
    dataset = Dataset.from_dict({"input_ids": prompts})
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=models["actor"],
        ref_model=models["reference"],
        reward_model=models["reward"],
        value_model=models["critic"],
        train_dataset=dataset,
        eval_dataset=dataset,
        callbacks=[laps],
    )
    # Accelerate would step once per gradient_accumulation_steps micro-batches, which is once per pass here, or at every
    # micro-batch of the data's last batch. Both sides should step once per minibatch.
    trainer.dataloader = [tokenizer.pad({"input_ids": prompts}, return_tensors="pt")]
    trainer.accelerator.gradient_accumulation_steps = max(1, job.minibatch_size // config.per_device_train_batch_size)
    return trainer


def follow_script(trainer: PPOTrainer, script: Script) -> None:
    """Make the policy sample the scripted tokens."""
    generate = trainer.policy_model.generate

    def scripted(*args: Any, **kwargs: Any) -> Any:
        with scripted_multinomial(script, kwargs["input_ids"]):
            return generate(*args, **kwargs)

    trainer.policy_model.generate = scripted


def time_phases(trainer: PPOTrainer, clock: Clock) -> dict[str, int]:
    """Time the parts of an update; returns a count of optimizer steps, which the run increases."""
    clock.around(ppo_trainer, "batch_generation", "rollout", after="scoring")
    clock.around(ppo_trainer, "masked_whiten", "other")  # the end of scoring
    # up to backward: the loss belongs to it
    clock.around(ppo_trainer, "forward", "forward", after="forward", when=torch.is_grad_enabled)
    clock.around(trainer.accelerator, "backward", "backward")
    clock.around(trainer.optimizer, "step", "optimizer")
    count = {"steps": 0}

    def counted(*args: Any) -> None:
        count["steps"] += 1

    trainer.optimizer.optimizer.register_step_post_hook(counted)  # the wrapped step skips while it accumulates
    return count


def capture() -> dict[str, Any]:
    """Wrap the functions that compute one update's numbers; returns the dict that collects them."""
    arrays: dict[str, Any] = {}
    calls = {name: [] for name in ("selective_log_softmax", "get_reward", "masked_whiten", "masked_mean")}

    def record(name: str) -> None:
        function = getattr(ppo_trainer, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            # in the update, masked_mean is called for the value loss, its clipped share and the policy loss
            if (name == "masked_mean") == torch.is_grad_enabled():
                calls[name].append((args, result))
            return result

        setattr(ppo_trainer, name, wrapped)

    for name in calls:
        record(name)

    def gather() -> dict[str, Any]:
        logprobs, references = calls["selective_log_softmax"][:2]
        arguments, (values, _, _) = calls["get_reward"][0]
        start = arguments[3]
        arrays["response_ids"] = arguments[1][:, start:].cpu().numpy()
        arrays["logprobs"], arrays["ref_logprobs"] = logprobs[1].cpu().numpy(), references[1].cpu().numpy()
        arrays["values"] = values[:, start - 1 : -1, 0].cpu().numpy()
        arrays["advantages"] = calls["masked_whiten"][0][1].cpu().numpy()
        arrays["value_loss"] = [0.5 * result.item() for _, result in calls["masked_mean"][0::3]]
        arrays["policy_loss"] = [result.item() for _, result in calls["masked_mean"][2::3]]
        return arrays

    arrays["gather"] = gather
    return arrays


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the updates."""
    torch.set_num_threads(spec["threads"])
    warnings.filterwarnings("ignore")
    folder, updates, settings = Path(spec["folder"]), spec["warmup"] + spec["updates"], DEFAULTS | spec["settings"]
    job, prompts, responses = files.read(folder)
    settings["per_device"] = min(settings["per_device"], job.minibatch_size)
    config, clock = make_config(job, folder, updates, spec["precision"], settings), Clock()
    trainer = make_trainer(folder, job, config, settings["attention"], Laps(clock))
    follow_script(trainer, Script(prompts, responses))
    count = time_phases(trainer, clock)
    captured = capture() if spec["capture"] else None
    for model in (trainer.model, trainer.ref_model, trainer.reward_model):
        touch(model)
    loaded = memory()[0]
    trainer.train()
    peak = memory()[1]
    if captured:
        gather = captured.pop("gather")
        np.savez(spec["capture"], **gather())
    lengths = [(len(p), response_length(r)) for p, r in zip(prompts, responses, strict=True)]
    return {
        "updates": clock.laps[spec["warmup"] :],
        "tokens": sum(response for _, response in lengths),
        "flops": update_flops(job.hidden, job.layers, job.vocabulary, lengths, job.epochs),
        "optimizer_steps": count["steps"] / updates,
        "loaded_bytes": loaded,
        "peak_bytes": peak - loaded,
        "settings": settings,
        "in_force": {
            "trl": trl.__version__,
            "gradient_checkpointing asked": config.gradient_checkpointing,
            "gradient_checkpointing on": trainer.policy_model.is_gradient_checkpointing,
            "bf16": config.bf16,
            "local_rollout_forward_batch_size": config.local_rollout_forward_batch_size,
            "attention": trainer.policy_model.config._attn_implementation,
            "optimizer": str(config.optim),
            "learning_rate": config.learning_rate,
        },
    }


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))))
