"""One update on one process and the same update on several ranks, by every strategy."""

import json
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import lit_ppo.ppo.build
from lit_ppo import LitPPO, TextDataModule, callbacks
from lit_ppo.models.lora import add_adapter
from lit_ppo.parallel.full_state import full_weights
from lit_ppo.parallel.ranks import n_ranks, rank
from lit_ppo.ppo import preflight
from lit_ppo.rewards import RewardModel
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny import WORDS, make_causal_lm, make_reward_model
from tests.helpers.toys import logged, make_data, make_module, make_trainer
from tests.helpers.two_ranks import TrainedRows

# KL that the second update exceeds and the first does not, for this order of prompts; without and with adapters
STOP_AT = {"gpt2": (0.032, 0.0068), "llama": (0.0088,)}


@dataclass(frozen=True)
class Case:
    """How an update is run."""

    family: str = "gpt2"
    strategy: str = "auto"
    micro_batch_size: int = 3
    activation_checkpointing: bool | Literal["by need"] = False
    tied: bool = True
    compiled: bool = False
    features: bool = False  # all tricks that touch models, gradients, optimizers or the data, over two updates
    fixed_reference: bool = False  # but not the one that moves the reference, which adapters refuse
    lora: bool = False  # adapters in actor and critic

    @property
    def base(self) -> "Case":
        """The same on one process."""
        return replace(self, strategy="auto", micro_batch_size=3, activation_checkpointing=False, compiled=False)


def add_trained_adapter(argument: str, model: Any, *args: Any) -> None:
    """Adapters as they are after some steps: a new one has zeros in one half, and the other has no gradient."""
    add_adapter(argument, model, *args)
    with torch.no_grad():
        for number, (parameter, weight) in enumerate(model.named_parameters()):
            if "lora_B" in parameter:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))


class Spy(LitPPO):
    """Keeps the samples, and the full gradients of each step before clipping."""

    def configure_model(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lit_ppo.ppo.build, "add_adapter", add_trained_adapter)
            super().configure_model()

    def rollout(self, *args: Any, **kwargs: Any) -> Any:
        experience = super().rollout(*args, **kwargs)
        self.samples.append(experience.response_ids)
        self.lengths.update(experience.response_mask.sum(1).tolist())
        return experience

    def on_fit_start(self) -> None:
        self.samples, self.lengths, self.gradients = [], set(), []
        super().on_fit_start()

    def step_optimizers(self, *args: Any) -> None:
        self.gradients.append({**full_gradients("actor", self.actor), **full_gradients("critic", self.critic)})
        super().step_optimizers(*args)


def tricks(case: Case, folder: Path) -> list[Any]:
    """The callbacks: with ``features`` every kind that touches models, gradients, optimizers or the data."""
    always = [
        callbacks.RewardNormalization(),
        callbacks.AdaptiveKL(target=0.01, horizon=50),
        callbacks.EntropyBonus(coef=0.02),
    ]
    if not case.features:
        return always
    texts = folder / "texts.jsonl"
    if rank() == 0:
        texts.write_text("".join(json.dumps({"text": " ".join(WORDS[i : i + 2 + i % 4])}) + "\n" for i in range(9)))
    return [
        callbacks.PrioritizedSampling(scale=(-1.0, 1.0)),
        callbacks.RewardBaseline(),
        *always,
        callbacks.ValueNormalization(),
        callbacks.PTXLoss(TextDataModule(str(texts), batch_size=5, seed=0), coef=0.5),
        callbacks.KLLoss(coef=0.3, kind="exact"),
        callbacks.KLEarlyStop(target=STOP_AT[case.family][case.lora]),
        callbacks.LearningRateAdaptation(target=0.5, maximum=0.2),
        *([] if case.fixed_reference else [callbacks.ReferenceUpdate(decay=0.5)]),
    ]


def full_gradients(name: str, model: Any) -> dict[str, Tensor]:
    """Every parameter's full gradient; collective."""
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {
        f"{name}.{n}": (g.full_tensor() if isinstance(g, DTensor) else g).detach().clone() for n, g in gradients.items()
    }


def weights(module: Any) -> dict[str, Tensor]:
    """Full weights of all models, on rank 0; collective."""
    named: dict[str, Tensor] = {}
    for name, model in module.named_children():  # a reference that is the actor without its adapter is none
        if name not in ("actor", "critic", "reference"):
            continue
        full = full_weights(model)
        own = model.state_dict() if full is None else full
        named |= {f"{name}.{n}": tensor.clone() for n, tensor in own.items()}
    return named


def make_models(folder: Path, case: Case) -> tuple[Path, Path]:
    """An actor, and a reward model from which the critic starts: one whose head is zeros has no gradient within."""
    actor, reward = (folder / f"{kind}-{case.family}-{case.tied}" for kind in ("actor", "reward"))
    if not reward.exists() and rank() == 0:
        make_causal_lm(actor, case.family, scale=4.0, tie_word_embeddings=case.tied)
        make_reward_model(reward, case.family)
    return actor, reward


def adapters(case: Case) -> dict[str, Any]:
    """Arguments of the module."""
    fields = {"r": 3, "target_modules": "all-linear"}
    both = {"actor_lora": {**fields, "lora_alpha": 12}, "critic_lora": {**fields, "lora_alpha": 6}}
    return both if case.lora else {}


class Work(TrainedRows):
    """Also keeps the weights at the end of training, before ``ValueNormalization`` restores the critic's units."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights = weights(pl_module)


def update(case: Case, folder: Path) -> dict[str, Any]:
    """An update of two optimizer steps, or two such updates; what they did, on the first rank."""
    actor, reward = make_models(folder, case)
    module: Any = make_module(
        actor,
        critic="reward",
        rewards=RewardModel(str(reward)),
        micro_batch_size=case.micro_batch_size,
        activation_checkpointing=None if case.activation_checkpointing == "by need" else case.activation_checkpointing,
        compile_blocks=case.compiled,
        minibatch_size=7,
        max_grad_norm=None,
        **adapters(case),
    )
    module.__class__ = Spy
    updates = 2 if case.features else 1
    rows = Work()
    trainer = make_trainer(
        folder / "run",
        devices=n_ranks(),
        strategy=case.strategy,
        max_steps=updates,
        max_epochs=1,
        callbacks=[*tricks(case, folder), rows],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # others take minutes
        if case.activation_checkpointing == "by need":  # as on GPUs without free memory
            patch.setattr(preflight, "RECOMPUTE_ON", ("cpu",))
            patch.setattr(preflight, "free_bytes", lambda device: 0)
        trainer.fit(module, make_data(folder, seed=8 if case.features else 0))
    assert trainer.world_size == n_ranks()
    assert bool(module.model_settings.activation_checkpointing) == bool(case.activation_checkpointing)
    return {"module": module, "logged": logged(trainer), "rows": rows}


def result(case: Case, folder: Path) -> dict[str, Any]:
    """What an update did, in a form that can be saved."""
    run = update(case, folder)
    module = run["module"]
    after = run["rows"].weights
    if n_ranks() > 1:
        check_ranks(case, module, run["rows"])
    return {
        "samples": module.samples,
        "lengths": module.lengths,
        "gradients": module.gradients,
        "weights": after,
        "logged": run["logged"],
    }


def check_ranks(case: Case, module: Any, rows: TrainedRows) -> None:
    """Each rank had work of its own, and under FSDP2 holds only its shards."""
    rows.check_share()
    if case.strategy == "fsdp2":
        parameters = [
            p for model in (module.actor, module.critic, module.reference) for _, p in model.named_parameters()
        ]
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
        total: list[Any] = [None] * n_ranks()
        dist.all_gather_object(total, held)
        assert held < 0.7 * sum(total), f"rank {rank()} holds {held} of {sum(total)} parameters"


def run_cases(cases: list[Case], folder: Path) -> None:
    """On each rank; the first one leaves the results."""
    warnings.simplefilter("ignore")
    for number, case in enumerate(cases):
        found = result(case, folder)
        if rank() == 0:
            torch.save(found, folder / f"{n_ranks()}-{number}.pt")
        dist.barrier()


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference relative to the norm."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def differences(many: dict[str, Any], one: dict[str, Any], start: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative difference of any parameter: of gradients, of changes, and of changes beyond rounding.

    A float32 weight near 1 moves in steps of 1.2e-7, and a change of 1e-3 in all is then known to 1e-4: beyond rounding
    is what is over one such step in each weight. It hangs on the CPU whether a weight rounds the other way, but few do:
    ``all_but_two`` leaves out the two weights of each parameter that differ most.
    """
    assert len(many["gradients"]) == len(one["gradients"])
    pairs = list(zip(many["gradients"], one["gradients"], strict=True))
    assert all(ours.keys() == theirs.keys() for ours, theirs in pairs)
    found = {"gradients": 0.0, "changes": 0.0, "beyond_rounding": 0.0, "all_but_two": 0.0}
    for name in one["gradients"][0]:
        ours, theirs = many["weights"][name], one["weights"][name]
        step = (theirs.abs().nextafter(torch.tensor(torch.inf)) - theirs.abs()).double()
        change = (theirs.double() - start[name].double()).norm()
        error = (ours.double() - theirs.double()).abs()
        of_this = {
            "gradients": max(relative(ours[name], theirs[name]) for ours, theirs in pairs),
            "changes": float(error.norm() / change),
            "beyond_rounding": float((error - step).clamp(min=0).norm() / change),
            "all_but_two": float(error.flatten().sort().values[:-2].norm() / change),
        }
        found = {key: max(value, of_this[key]) for key, value in found.items()}
    return found


CASES = {
    2: [
        Case("llama", "ddp", 1, activation_checkpointing="by need", features=True),
        Case("llama", "fsdp2", 1, activation_checkpointing=True, features=True),
        Case(strategy="fsdp2", micro_batch_size=2, activation_checkpointing="by need", compiled=True),
        Case(strategy="ddp", micro_batch_size=2, features=True, fixed_reference=True, lora=True),
        Case(
            strategy="fsdp2",
            micro_batch_size=2,
            activation_checkpointing=True,
            features=True,
            fixed_reference=True,
            lora=True,
        ),
    ],
    3: [
        Case(strategy="ddp", micro_batch_size=1),
        Case(strategy="fsdp2", micro_batch_size=2, features=True),
        Case("llama", "fsdp2", 1, activation_checkpointing="by need", tied=False),
        Case("llama", "fsdp2", 2, lora=True),
    ],
}


def compare(folder: Path) -> dict[tuple[int, Case], dict[str, Any]]:
    """Run each case on its number of ranks, and its like on one process."""
    ones = {base: result(base, folder) for base in {case.base: None for cases in CASES.values() for case in cases}}
    found = {}
    for n, cases in CASES.items():
        on_ranks(n, run_cases, cases, folder, folder=folder / f"{n}-ranks")
        for number, case in enumerate(cases):
            many = torch.load(folder / f"{n}-{number}.pt", weights_only=False)
            actor, reward = make_models(folder, case)
            module = make_module(actor, critic="reward", rewards=RewardModel(str(reward)), **adapters(case))
            module.__class__ = Spy
            module.configure_model()
            one, start = ones[case.base], weights(module)
            found[n, case] = {"one": one, "many": many, "start": start, **differences(many, one, start)}
    return found
