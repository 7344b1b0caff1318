"""Sample the next batch while the update runs: one update off-policy, corrected by importance weights."""

import math
from typing import Any

from lit_ppo.generation.transformers import row_seeds
from lit_ppo.validate import refuse


def try_engine(module: Any, trainer: Any) -> None:
    """Send the weights and ask for one sample, before the first update; check what sampling ahead needs.

    Raises:
        ValueError: The next prompts are not known, or nothing corrects for samples of the weights before the update.
    """
    if module.rollout_ahead and not any(
        getattr(callback, "corrects_sampling", False) for callback in trainer.callbacks
    ):
        problem = "samples are of the weights before the last update; add the callback ImportanceCorrection"
        refuse(module, "rollout_ahead", module.rollout_ahead, problem)
    if module.rollout_ahead and (module.loop or not hasattr(getattr(trainer, "datamodule", None), "upcoming")):
        problem = "the next prompts must be known; train with fit and a PromptDataModule, or leave it out"
        refuse(module, "rollout_ahead", module.rollout_ahead, problem)
    module.sampler.is_stale = True
    module.rollout({"input_ids": [[1]], "attention_mask": [[1]]}, logprobs=False, stream="preflight")


def start_ahead(module: Any) -> None:
    """Ask the engine, in a thread, for the responses of the next update, with the weights before this one."""
    if _is_last(module.trainer):
        return
    batch, n = module.trainer.datamodule.upcoming(), module.samples_per_prompt
    rows = [ids for ids in batch.prompt_ids for _ in range(n)]
    seeds = row_seeds((module.seed, "train", module.rollouts), len(batch), n)
    module.sampler.start_ahead(rows, module.generation, seeds)


def _is_last(trainer: Any) -> bool:
    """Whether this update is the last one, as far as the Trainer's limits tell."""
    if trainer.max_steps != -1 and trainer.global_step + 1 >= trainer.max_steps:
        return True
    batches = trainer.fit_loop.epoch_loop.batch_progress
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    ends_epoch = batches.is_last_batch or batches.current.ready >= trainer.num_training_batches
    return bool(ends_epoch and trainer.current_epoch + 1 >= epochs)
