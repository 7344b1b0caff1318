"""The jobs of the golden record: tiny, deterministic, and between them every part that computes a number.

Plain SGD, or AdamW with a large ``eps``: an Adam step by the sign of a gradient that is zero up to rounding would make
the weights differ from one machine to the next.
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from lit_ppo import LitPPO, LitRewardModel, LitSFT, PreferenceDataModule, TextDataModule
from lit_ppo.advantages import GroupRelative, LeaveOneOut, Reinforce
from lit_ppo.callbacks import (
    AdaptiveKL,
    AdvantageNormalization,
    CriticWarmup,
    CurriculumSampling,
    DualClip,
    EntropyBonus,
    KLEarlyStop,
    KLLoss,
    LearningRateAdaptation,
    LengthPenalty,
    MissingEndPenalty,
    PrioritizedSampling,
    PTXLoss,
    ReferenceUpdate,
    RejectionSampling,
    RewardBaseline,
    RewardClipping,
    RewardNormalization,
    RewardScaling,
    RewardWhitening,
    ValueClipping,
    ValueNormalization,
)
from lit_ppo.rewards import RewardModel
from tests.golden.result import Result, Rows, result
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny import WORDS, make_causal_lm, make_reward_model
from tests.helpers.toys import GOOD, count_good, make_data, make_module, make_trainer, write_prompts

UPDATES = 6


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(folder: Path, n: int = 12) -> str:
    """Texts of two to five words."""
    return write_rows(folder / "texts.jsonl", [{"text": " ".join(WORDS[i : i + 2 + i % 4])} for i in range(n)])


def pairs(folder: Path, n: int = 12) -> str:
    """Pairs of which the better text has one of the good words."""
    starts = [" ".join(WORDS[i : i + 1 + i % 3]) for i in range(n)]
    return write_rows(
        folder / "pairs.jsonl",
        [{"chosen": f"{start} {GOOD[i % 5]}", "rejected": f"{start} bad"} for i, start in enumerate(starts)],
    )


def decaying(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.9**step)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, eps=0.01)


def make_actor(folder: Path, family: str = "gpt2") -> Path:
    return make_causal_lm(folder / "actor", family, scale=3.0)


def ppo(
    folder: Path,
    *,
    family: str = "gpt2",
    actor: Path | None = None,
    callbacks: Any = (),
    trainer: Any = None,
    data: Any = None,
    **arguments: Any,
) -> Result:
    """Train for ``UPDATES`` updates on 7 prompts each, from 12."""
    actor = actor or make_actor(folder, family)
    module: LitPPO = make_module(actor, **{"max_grad_norm": 1.0, "generation": {"max_new_tokens": 8}, **arguments})
    settings = {"max_steps": UPDATES, "logger": Rows(), "callbacks": list(callbacks), **(trainer or {})}
    fitted = make_trainer(folder, **settings)
    fitted.fit(module, make_data(folder, **(data or {})))
    return result(module, fitted)


def gae(folder: Path) -> Result:
    """The default estimator with schedules; and validation, with a score that the actor is not trained on."""
    reward = make_reward_model(folder / "reward", "gpt2")
    return ppo(
        folder,
        actor_scheduler=decaying,
        critic_scheduler=decaying,
        eval_rewards={"other": RewardModel(str(reward))},
        data={"val_path": str(write_prompts(folder / "held_out.jsonl", 5))},
    )


def grpo(folder: Path) -> Result:
    return ppo(
        folder,
        family="llama",
        critic=None,
        advantages=GroupRelative(),
        samples_per_prompt=3,
        kl_coef=0.0,
        temperature=0.8,
        callbacks=[KLLoss(coef=0.1, kind="k3")],
    )


def rloo(folder: Path) -> Result:
    return ppo(
        folder,
        critic=None,
        advantages=LeaveOneOut(),
        samples_per_prompt=2,
        loss_reduction="sequence_mean",
        micro_batch_size=None,
        micro_batch_tokens=40,
    )


def reinforce_pp(folder: Path) -> Result:
    """With two scores, one of them a reward model's."""
    reward = make_reward_model(folder / "reward", "llama")
    rewards = {
        "good": {"source": count_good, "weight": 1.0},
        "model": {"source": RewardModel(str(reward)), "weight": 0.5},
    }
    return ppo(folder, family="llama", critic=None, advantages=Reinforce(), rewards=rewards, kl_estimator="k2")


def lora(folder: Path) -> Result:
    adapter = {"r": 3, "lora_alpha": 12, "target_modules": "all-linear"}
    return ppo(folder, family="llama", actor_lora=adapter, critic_lora=adapter, actor_optimizer=adamw)


def stateful_tricks(folder: Path) -> Result:
    """Every trick with a state of its own, except those that refuse one of these."""
    return ppo(
        folder,
        callbacks=[
            CriticWarmup(updates=1),
            PrioritizedSampling(scale=(0.0, 3.0)),
            RewardBaseline(),
            RewardNormalization(clip=3.0),
            AdaptiveKL(target=0.5, horizon=50),
            EntropyBonus(coef=0.02, target=3.0),
            ValueNormalization(decay=0.9),
            PTXLoss(TextDataModule(texts(folder), batch_size=5, seed=0), coef=0.5),
            KLLoss(coef=0.3, kind="exact"),
            KLEarlyStop(target=0.015),
            LearningRateAdaptation(target=0.004, factor=1.2, minimum=0.01, maximum=0.2),
            ReferenceUpdate(decay=0.5),
        ],
    )


def other_tricks(folder: Path) -> Result:
    """The others: without a state, or of those that refuse one of the stateful ones."""
    return ppo(
        folder,
        family="llama",
        callbacks=[
            CurriculumSampling(column="level", updates=4, start=0.5),
            RejectionSampling(k=2, every=2),
            LengthPenalty(budget=5, coef=0.1, max_penalty=0.5),
            MissingEndPenalty(penalty=0.2),
            RewardScaling(decay=0.9),
            RewardClipping(limit=2.0),
            RewardWhitening(),
            AdvantageNormalization(scope="minibatch"),
            DualClip(c=1.25),
            ValueClipping(clip_range=0.1),
        ],
    )


def supervised(folder: Path, module: Any, data: Any) -> Result:
    """Two epochs of four optimizer steps, each with a validation."""
    settings = {"max_epochs": 2, "max_steps": -1, "gradient_clip_val": 1.0, "num_sanity_val_steps": 0}
    trainer = make_trainer(folder, logger=Rows(), **settings)
    trainer.fit(module, data)
    return result(module, trainer)


def sft(folder: Path) -> Result:
    model = make_causal_lm(folder / "model", "llama")
    module = LitSFT(str(model), optimizer=adamw, scheduler=decaying)
    return supervised(folder, module, TextDataModule(texts(folder, 16), val_fraction=0.25, batch_size=3, seed=0))


def reward_model(folder: Path) -> Result:
    model = make_causal_lm(folder / "model", "llama")
    module = LitRewardModel(str(model), optimizer=adamw, scheduler=decaying)
    return supervised(folder, module, PreferenceDataModule(pairs(folder, 16), val_fraction=0.25, batch_size=3, seed=0))


def on_two_ranks(strategy: str, folder: Path) -> Result:
    """The default job, with callbacks that need numbers of both ranks; the models are copied or sharded."""
    on_ranks(2, _of_rank, strategy, make_actor(folder), folder, folder=folder)
    found: Result = json.loads((folder / "result.json").read_text())
    return found


def _of_rank(strategy: str, actor: Path, folder: Path) -> None:
    own = folder / f"files-{torch.distributed.get_rank()}"
    own.mkdir()
    found = ppo(
        own,
        actor=actor,
        trainer={"devices": 2, "strategy": strategy},
        callbacks=[RewardNormalization(), AdaptiveKL(target=0.5, horizon=50), ValueNormalization()],
        activation_checkpointing=strategy == "fsdp2",
    )
    if torch.distributed.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(found))


JOBS: dict[str, Callable[[Path], Result]] = {
    "gae": gae,
    "grpo": grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "lora": lora,
    "stateful_tricks": stateful_tricks,
    "other_tricks": other_tricks,
    "ddp": partial(on_two_ranks, "ddp"),
    "fsdp2": partial(on_two_ranks, "fsdp2"),
    "sft": sft,
    "reward_model": reward_model,
}


def run_job(name: str) -> Result:
    """Run a job with one thread, whatever the process has: sums are split between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            torch.manual_seed(0)
            return JOBS[name](Path(folder))
    finally:
        torch.set_num_threads(threads)
