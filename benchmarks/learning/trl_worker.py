"""Train with TRL's PPOTrainer and print one JSON line: ``python -m benchmarks.learning.trl_worker SPEC``.

Runs in an environment of TRL's own, without lit_ppo. Models, prompts and their order are those of ``lit-ppo``.
"""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.learning.trl_batches import Batches, MeanOverResponse


class Times(TrainerCallback):
    """Seconds of all updates so far."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.started[0]
        self.cpu_seconds = time.process_time() - self.started[1]


def make_config(spec: dict[str, Any]) -> PPOConfig:
    """One pass over each batch; what the spec does not say is TRL's own."""
    return PPOConfig(
        output_dir=spec["output"],
        per_device_train_batch_size=spec["minibatch"],
        gradient_accumulation_steps=len(spec["batches"][0]) // spec["minibatch"],
        num_mini_batches=len(spec["batches"][0]) // spec["minibatch"],
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=len(spec["batches"][0]),
        response_length=spec["tokens"],
        total_episodes=sum(map(len, spec["batches"])),
        stop_token="eos",
        temperature=1.0,
        learning_rate=spec["rate"],
        lr_scheduler_type=spec["schedule"],
        kl_coef=spec["kl_coef"],
        lam=spec["lam"],
        seed=spec["seed"],
        use_cpu=True,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def make_trainer(spec: dict[str, Any], times: Times) -> PPOTrainer:
    """PPOTrainer with the spec's models."""
    actor, classifying = Path(spec["actor"]), (Path(spec["reward"]), Path(spec["critic"]))
    tokenizer = AutoTokenizer.from_pretrained(actor, padding_side="left")
    lms = [AutoModelForCausalLM.from_pretrained(actor, dtype=torch.float32) for _ in range(2)]
    classifiers = [AutoModelForSequenceClassification.from_pretrained(x, dtype=torch.float32) for x in classifying]
    if spec["aggregation"] == "mean":
        classifiers[0].score = MeanOverResponse(classifiers[0].score)
    dataset = Dataset.from_dict({"input_ids": [ids for batch in spec["batches"] for ids in batch]})
    trainer = PPOTrainer(
        args=make_config(spec),
        processing_class=tokenizer,
        model=lms[0],
        ref_model=lms[1],
        reward_model=classifiers[0],
        value_model=classifiers[1],
        train_dataset=dataset,
        eval_dataset=dataset,
        callbacks=[times],
    )
    trainer.dataloader = Batches(spec["batches"], tokenizer, classifiers[0].score)
    trainer.accelerator.gradient_accumulation_steps = 1  # otherwise it would step once a pass
    return trainer


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Train, and save the actor."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    set_seed(spec["seed"])
    times = Times()
    trainer = make_trainer(spec, times)
    trainer.train()
    trainer.policy_model.save_pretrained(spec["output"])
    trainer.processing_class.save_pretrained(spec["output"])
    scores = [row["objective/scores"] for row in trainer.state.log_history if "objective/scores" in row]
    return {"trl": trl.__version__, "seconds": times.seconds, "cpu_seconds": times.cpu_seconds, "scores": scores}


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
