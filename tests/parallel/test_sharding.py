"""Sharded models: built without full copies, gradients reduced once per step, full checkpoints, bit for bit."""

import warnings
from collections import Counter, defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from lit_ppo import FSDP2Strategy, LitPPO, LitSFT
from lit_ppo.callbacks import CriticWarmup, PPOCallback
from lit_ppo.models.actor_critic import Actor
from lit_ppo.models.load import load_causal_lm
from lit_ppo.parallel.full_state import full_weights
from lit_ppo.parallel.ranks import n_ranks, rank
from lit_ppo.parallel.sharding import build, gathered, shard
from lit_ppo.ppo import module as litppo
from lit_ppo.rewards import RewardModel
from lit_ppo.run.checkpoint import StepCheckpoint
from lit_ppo.run.export import ExportModel
from tests.helpers.ranks import on_ranks
from tests.helpers.supervised import HOW_TESTS_USE_LIGHTNING, loader
from tests.helpers.tiny import make_causal_lm, make_reward_model
from tests.helpers.toys import logged, make_data, make_module, make_trainer

FAMILIES = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MASK = torch.tensor([[False, True, True, True], [True, True, True, True]])
TARGETS = torch.tensor([[True, True], [True, True]])


class Strategy:
    """What building and sharding need of a strategy; records how many full weights a rank holds."""

    root_device = torch.device("cpu")

    def __init__(self) -> None:
        mesh = dist.init_device_mesh("cpu", (n_ranks(), 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        self.real = FSDP2Strategy()
        self.real._device_mesh = mesh
        self.model: Any = None
        self.most = 0

    def shard(self, module: Any, **options: Any) -> Any:
        full = [p for p in self.model.parameters() if not isinstance(p, DTensor) and not p.is_meta]
        self.most = max(self.most, sum(p.numel() for p in full))
        return self.real.shard(module, **options)


# On each rank


def load_families(folder: Path) -> None:
    for name in FAMILIES:
        stock = AutoModelForCausalLM.from_pretrained(folder / name)
        state, buffers = stock.state_dict(), dict(stock.named_buffers())
        actor, most = load(folder / name)
        size = sum(p.numel() for p in stock.parameters())
        assert most < 0.8 * size or rank() == 0, "this rank held a full copy"
        assert sum(p.to_local().numel() for p in actor.parameters()) < 0.6 * size
        full = full_weights(actor, "model.")
        assert full is not None
        if rank() == 0:
            assert full.keys() == state.keys()
            assert all(full[key].equal(tensor) for key, tensor in state.items())
            different = [len({tensor.data_ptr() for tensor in named.values()}) for named in (full, state)]
            assert different[0] == different[1], "tied weights came apart"
        with gathered(actor):
            ours = dict(actor.model.named_buffers())
            assert ours.keys() == buffers.keys()
            assert all(ours[key].equal(tensor) for key, tensor in buffers.items())
            pairs = zip(actor.model.parameters(), stock.parameters(), strict=True)
            assert all(p.equal(q) for p, q in pairs)
        assert all(isinstance(p, DTensor) for p in actor.parameters()), "still unsharded afterwards"
        with torch.no_grad():
            expected = Actor(stock)(IDS, MASK, target_mask=TARGETS)
            for _ in range(2):
                found = actor(IDS, MASK, target_mask=TARGETS)
                assert all(ours.equal(theirs) for ours, theirs in zip(found, expected, strict=True)), name


def load(path: Path) -> tuple[Any, int]:
    """A sharded actor, and the most full weights that this rank held at once."""
    strategy = Strategy()
    strategy.model = build(strategy, lambda: Actor(load_causal_lm("LitPPO(actor", str(path), {})))
    assert all(p.is_meta for p in strategy.model.parameters()) == (rank() > 0)
    return shard(strategy, strategy.model), strategy.most


def fail_on_the_first(folder: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"actor='nowhere'\): no such folder") as caught:
        build(Strategy(), lambda: Actor(load_causal_lm("LitPPO(actor", "nowhere", {})))
    assert ("rank 0 failed" in str(caught.value)) == (rank() > 0)


class Counting(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.n: Counter[str] = Counter()
        self.dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
        self.gathered = 0  # bytes that this rank has sent for weights

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function.__name__.split(".")[0].strip("_")
            self.n[name] += 1
            tensors = [tensor for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)]
            self.dtypes[name] |= {tensor.dtype for tensor in tensors}
            if name in ("allgather_base", "all_gather_into_tensor"):
                self.gathered += min(tensor.nbytes for tensor in tensors)  # the other one is what is received
        return function(*args, **kwargs or {})


class Counted(LitPPO):
    """Counts the collectives of an optimizer step, and of a text's gradient before it."""

    def backward_minibatch(self, minibatch: Any) -> dict[str, float]:
        ids = torch.arange(3, 19).view(8, 2)
        self.optimization.zero_gradients(self)
        with Counting() as counting:
            self.backward_on_text({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, 1.0)
        self.of_text = counting.n
        with Counting() as counting:
            metrics = super().backward_minibatch(minibatch)
        self.collectives = counting.n
        return metrics


def count_collectives(folder: Path) -> None:
    found = {}
    for name, size in (("fsdp2", 1), ("fsdp2", 2), ("each", 1), ("ddp", 1), ("ddp", 2)):
        strategy = FSDP2Strategy(sync_every_micro_batch=True) if name == "each" else name
        options = {"minibatch_size": 8, "micro_batch_size": size, "ppo_epochs": 1}
        module: Any = make_module(folder / "gpt2", **options)
        module.__class__ = Counted
        trainer = make_trainer(folder, devices=n_ranks(), strategy=strategy, max_steps=1)
        trainer.fit(module, make_data(folder, batch_size=8))
        full = full_weights(module.actor, "model.")
        weights = module.actor.model.state_dict() if full is None else full
        found[name, size] = module.collectives, module.of_text, weights
    if rank() == 0:
        torch.save(found, folder / "counted.pt")


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def fit(folder: Path, strategy: Any, *, updates: int, start: Path | None = None, name: str) -> Any:
    """Train until update ``updates``, from a checkpoint; writes a checkpoint and an exported model under ``name``."""
    reward = RewardModel(str(folder / "reward"))
    module = make_module(folder / "gpt2", rewards=reward, actor_optimizer=adam, critic_optimizer=adam)
    callbacks = [
        CriticWarmup(updates=1),
        StepCheckpoint(every_n_train_steps=9, dirpath=str(folder / name)),
        ExportModel(str(folder / name / "model")),
    ]
    trainer = make_trainer(
        folder, devices=n_ranks(), strategy=strategy, max_steps=updates, callbacks=callbacks, enable_checkpointing=True
    )
    trainer.fit(module, make_data(folder), ckpt_path=None if start is None else str(start), weights_only=True)
    return module, trainer


def save_and_load(folder: Path) -> None:
    """Train; load checkpoints of one process and save them again."""
    fit(folder, "fsdp2", updates=2, name="fsdp2-2")
    for step, name in ((1, "fsdp2"), (2, "fsdp2"), (2, "ddp")):
        start = folder / f"one-{step}" / f"step-{step:06d}.ckpt"
        _, trainer = fit(folder, name, updates=step, start=start, name=f"{name}-2-again-{step}")
        trainer.save_checkpoint(folder / f"{name}-2-again-{step}.ckpt")


def three(folder: Path) -> None:
    """Load the checkpoint of two ranks."""
    warnings.simplefilter("ignore")
    start = folder / "fsdp2-2/step-000002.ckpt"
    _, trainer = fit(folder, "fsdp2", updates=2, start=start, name="fsdp2-3-again")
    trainer.save_checkpoint(folder / "fsdp2-3-again.ckpt")


PRECISIONS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {  # of the strategy, the trainer, the module
    "offloaded": ({"offload_frozen": True}, "32-true", {}),
    "bf16 weights": ({"mixed_precision": "bfloat16"}, "32-true", {}),
    "bf16-mixed": ({}, "bf16-mixed", {}),
    "bf16 reference": ({}, "32-true", {"reference_dtype": "bfloat16"}),
}


class KeepSamples(PPOCallback):
    """The samples of the last rollout, and the bytes of weights that this rank has sent for them."""

    def __init__(self) -> None:
        self.samples: Any = None
        self.sent = 0

    def on_rollout_end(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        self.samples = experience.response_ids

    def counting(self, sample: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            with Counting() as counting:
                sampled = sample(*args, **options)
            self.sent = counting.gathered
            return sampled

        return counted


def precisions(folder: Path) -> None:
    """On a CPU, offloading changes nothing. What it saves can only be measured on GPUs."""
    found = {}
    sample = litppo.sample_responses
    for name, (options, precision, overrides) in PRECISIONS.items():
        module: Any = make_module(folder / "gpt2", rewards=RewardModel(str(folder / "reward")), **overrides)
        strategy = FSDP2Strategy(**options)
        keep = KeepSamples()
        trainer = make_trainer(
            folder, devices=n_ranks(), strategy=strategy, precision=precision, max_steps=1, callbacks=[keep]
        )
        litppo.sample_responses = keep.counting(sample)
        with Counting() as counting:
            trainer.fit(module, make_data(folder))
        litppo.sample_responses = sample
        # the reward model and the reference: two blocks and the rest each, and a scoring head in float32
        assert len(strategy._offloaded) == (7 if name == "offloaded" else 0)
        trained = {p.dtype for model in (module.actor, module.critic) for p in model.parameters()}
        assert trained == {torch.float32}
        reference = getattr(torch, module.model_settings.reference_dtype or "float32")
        assert {p.dtype for p in module.reference.parameters()} == {reference}
        found[name] = logged(trainer)[0], counting.dtypes, keep.samples, keep.sent
    if rank() == 0:
        torch.save(found, folder / "precisions.pt")


class FullGradients(PPOCallback):
    """Bytes of the gradients that FSDP2 has not reduced yet, before each backward."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int, int]] = []

    def on_actor_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
        self.found.append(("actor", *(full_gradients(getattr(pl_module, name)) for name in ("actor", "critic"))))

    def on_critic_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
        self.found.append(("critic", *(full_gradients(getattr(pl_module, name)) for name in ("actor", "critic"))))


def full_gradients(model: Any) -> int:
    total = 0
    for unit in [part for part in model.modules() if isinstance(part, FSDPModule)]:
        state = unit._get_fsdp_state()
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
            for p in group.fsdp_params:
                kept = [p.unsharded_accumulated_grad, getattr(getattr(p, "_unsharded_param", None), "grad", None)]
                total += sum(x.nbytes for x in kept if x is not None)
    return total


def count_full_gradients(folder: Path) -> None:
    """Four rows on each rank, in micro-batches of two."""
    callback, options = FullGradients(), {"minibatch_size": 8, "micro_batch_size": 2, "ppo_epochs": 1}
    trainer = make_trainer(folder, devices=n_ranks(), strategy="fsdp2", max_steps=1, callbacks=[callback])
    trainer.fit(make_module(folder / "gpt2", **options), make_data(folder, batch_size=8))
    if rank() == 0:
        torch.save(callback.found, folder / "gradients.pt")


def keep_models(folder: Path) -> None:
    """Models that are built for one strategy are refused by another."""
    module = make_module(folder / "gpt2")
    module.rollout(["the film"])
    trainer = make_trainer(folder, devices=n_ranks(), strategy="fsdp2", max_steps=1)
    with pytest.raises(ValueError, match=r"FSDP2Strategy\): the models of this LitPPO were already built unsharded"):
        trainer.fit(module, make_data(folder))
    module = make_module(folder / "gpt2")
    for strategy in ("fsdp2", "fsdp2", "ddp"):
        trainer = make_trainer(folder, devices=n_ranks(), strategy=strategy, max_steps=1)
        refused = pytest.raises(
            ValueError, match=r"DDPStrategy\): the models .* built sharded, and this strategy does not"
        )
        with refused if strategy == "ddp" else nullcontext():
            trainer.fit(module, make_data(folder))
    assert module.rollouts == 2


def refuse_fused(folder: Path) -> None:
    module = make_module(folder / "gpt2", actor_optimizer=lambda params: torch.optim.SGD(params, lr=0.1, fused=True))
    trainer = make_trainer(folder, devices=n_ranks(), strategy="fsdp2", max_steps=1)
    with pytest.raises(ValueError, match=r"SGD\(fused=True\): PyTorch has no fused SGD for FSDP2Strategy"):
        trainer.fit(module, make_data(folder))


def refuse_fetched_code(folder: Path) -> None:
    class Fetched(torch.nn.Linear):
        """As transformers makes it of code from the hub."""

    Fetched.__module__ = "transformers_modules.someone.modeling"
    with pytest.raises((ValueError, RuntimeError), match=r"Fetched: models with remote code .* use 'ddp'"):
        build(Strategy(), lambda: Fetched(2, 2))


def fail_alone(folder: Path) -> None:
    """A reward that raises on one rank, next to a sharded reward model."""

    def on_the_second(prompts: list[str], responses: list[str]) -> list[float]:
        if rank() == 1:
            raise KeyError("level")
        return [0.0] * len(prompts)

    rewards = {"model": RewardModel(str(folder / "reward")), "other": on_the_second}
    trainer = make_trainer(folder, devices=n_ranks(), strategy="fsdp2", max_steps=1)
    with pytest.raises((RuntimeError, ValueError), match="level") as caught:
        trainer.fit(make_module(folder / "gpt2", rewards=rewards), make_data(folder))
    assert ("rank 1 failed" in str(caught.value)) == (rank() == 0)


def supervised(folder: Path) -> None:
    module = LitSFT(str(folder / "llama"), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    trainer = make_trainer(folder, devices=n_ranks(), strategy="fsdp2", max_steps=2, inference_mode=True)
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}] * 2
    trainer.fit(module, loader(batches))
    assert all(isinstance(p, DTensor) for p in module.model.parameters())
    module.save_pretrained(folder / "sft-sharded")


def everything(folder: Path) -> None:
    warnings.simplefilter("ignore")
    for part in (
        load_families,
        fail_on_the_first,
        fail_alone,
        refuse_fetched_code,
        refuse_fused,
        keep_models,
        count_collectives,
        count_full_gradients,
        precisions,
        supervised,
    ):
        print(part.__name__, flush=True)
        part(folder)
        dist.barrier()
    save_and_load(folder)


# The tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks wrote."""
    folder = tmp_path_factory.mktemp("sharding")
    for name, (family, options) in FAMILIES.items():
        make_causal_lm(folder / name, family, scale=4.0, **options)
    make_reward_model(folder / "reward")
    for step in (1, 2):
        fit(folder, "auto", updates=step, name=f"one-{step}")
    on_ranks(2, everything, folder, folder=folder / "ranks")
    on_ranks(3, three, folder, folder=folder / "three")
    module, trainer = fit(folder, "auto", updates=2, start=folder / "fsdp2-2/step-000002.ckpt", name="one-export")
    assert module.rollouts == 2
    trainer.save_checkpoint(folder / "one-export.ckpt")
    return folder


def test_gradients_are_exchanged_once_an_optimizer_step(folder):
    """Actor: two blocks and the rest. Critic: the value head as well. 7 units, for 2 or 4 micro-batches."""
    found = torch.load(folder / "counted.pt", weights_only=False)
    n = {key: counts for key, (counts, _, _) in found.items()}
    text = {key: counts for key, (_, counts, _) in found.items()}
    assert n["fsdp2", 1]["reduce_scatter_base"] == n["fsdp2", 2]["reduce_scatter_base"] == 7
    assert n["each", 1]["reduce_scatter_base"] == 4 * 7
    assert n["ddp", 1] == n["ddp", 2]
    assert n["ddp", 1]["allreduce"] > 0
    assert text["fsdp2", 1]["reduce_scatter_base"] == text["fsdp2", 2]["reduce_scatter_base"] == 3
    assert text["each", 1]["reduce_scatter_base"] == 4 * 3
    assert text["ddp", 1] == text["ddp", 2]
    expected = found["each", 1][2]
    for _, _, weights in found.values():
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def tensors(path: Path) -> dict[str, Any]:
    """Weights and optimizer states of a checkpoint, flat."""
    checkpoint = torch.load(path, weights_only=True)
    flat = dict(checkpoint["state_dict"])
    for number, state in enumerate(checkpoint["optimizer_states"]):
        flat[f"{number}.groups"] = state["param_groups"]
        flat |= {f"{number}.{p}.{key}": value for p, values in state["state"].items() for key, value in values.items()}
    return flat


@pytest.mark.parametrize(
    ("saved", "again"),
    [
        ("one-1", "fsdp2-2-again-1"),
        ("one-2", "fsdp2-2-again-2"),
        ("one-2", "ddp-2-again-2"),
        ("fsdp2-2", "fsdp2-3-again"),
        ("fsdp2-2", "one-export"),
    ],
)
def test_a_checkpoint_goes_through_other_ranks_unchanged(folder, saved, again):
    """After the first step the actor's optimizer has no state: it was warm-up."""
    (path,) = (folder / saved).glob("*.ckpt")
    expected = tensors(path)
    assert ("0.0.step" in expected) == (saved != "one-1")
    found = tensors(folder / f"{again}.ckpt")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.equal(found[name]) if isinstance(value, torch.Tensor) else value == found[name], name


def test_the_exported_model_is_the_same_byte_for_byte(folder):
    """Of ranks, and of one process that has loaded their checkpoint."""
    ours, theirs = folder / "fsdp2-2/model", folder / "one-export/model"
    names = {path.name for path in ours.iterdir()}
    assert names == {path.name for path in theirs.iterdir()} >= {"model.safetensors", "tokenizer.json"}
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    stock = AutoModelForCausalLM.from_pretrained(folder / "gpt2")
    trained = AutoModelForCausalLM.from_pretrained(ours)
    assert any(not p.equal(q) for p, q in zip(stock.parameters(), trained.parameters(), strict=True))


def test_offloading_and_lower_precision(folder):
    """Where sampling is in float32, samples are one process's; sums of gradients are always taken in float32."""
    found = torch.load(folder / "precisions.pt", weights_only=False)
    module = make_module(folder / "gpt2", rewards=RewardModel(str(folder / "reward")))
    trainer = make_trainer(folder, max_steps=1)
    trainer.fit(module, make_data(folder))
    (one,) = logged(trainer)
    names = ("objective/score", "response/length", "policy/grad_norm", "value/grad_norm", "policy/ratio")
    for name in names:
        assert found["offloaded"][0][name] == pytest.approx(one[name], rel=1e-4), name
    for name in names[:2]:
        assert found["bf16 reference"][0][name] == pytest.approx(one[name], rel=1e-4), name
    assert found["bf16 reference"][0]["objective/kl"] != one["objective/kl"]
    for how, (row, dtypes, _, _) in found.items():
        assert dtypes["reduce_scatter_base"] == {torch.float32}, how
        assert (torch.bfloat16 in dtypes["allgather_base"]) == ("weights" in how or "refer" in how)
        assert row["policy/ratio"] == pytest.approx(1.0, abs=0.05), how
        assert row["policy/grad_norm"] == pytest.approx(one["policy/grad_norm"], rel=0.5), how


def test_sampling_gathers_what_autocast_would_cast_in_bfloat16(folder):
    """GPT-2's linear layers in 2 bytes, embeddings and norms in 4; a shard has half of the rows, rounded up."""
    found = torch.load(folder / "precisions.pt", weights_only=False)
    linear, others = 0, 0
    for name, p in AutoModelForCausalLM.from_pretrained(folder / "gpt2").named_parameters():
        shard = -(-p.shape[0] // 2) * (p.numel() // p.shape[0])
        linear, others = (linear + shard, others) if ".c_" in name else (linear, others + shard)
    assert found["offloaded"][3] == 4 * linear + 4 * others
    assert found["bf16-mixed"][3] == 2 * linear + 4 * others
    assert found["bf16 weights"][3] == 2 * linear + 2 * others
    keep = KeepSamples()
    module = make_module(folder / "gpt2", rewards=RewardModel(str(folder / "reward")))
    make_trainer(folder, max_steps=1, precision="bf16-mixed", callbacks=[keep]).fit(module, make_data(folder))
    assert keep.samples.equal(found["bf16-mixed"][2])


def test_a_rank_holds_the_full_gradients_of_one_model_at_a_time(folder):
    """Before each of two micro-batches: bytes of actor and critic; the value head has a row and a bias more."""
    model = AutoModelForCausalLM.from_pretrained(folder / "gpt2")
    actor, width = 4 * sum(p.numel() for p in model.parameters()), model.config.n_embd
    expected = [("actor", 0, 0), ("actor", actor, 0), ("critic", 0, 0), ("critic", 0, actor + 4 * (width + 1))]
    assert torch.load(folder / "gradients.pt") == expected


def test_float64_is_refused(tiny_lm, tmp_path):
    module = make_module(tiny_lm)
    module._trainer = make_trainer(tmp_path, strategy="fsdp2", precision="64-true")
    with pytest.raises(ValueError, match=r"precision='64-true'\): models are sharded in float32"):
        module.setup("fit")


@HOW_TESTS_USE_LIGHTNING
def test_sft_on_ranks(folder, tmp_path):
    """Both ranks are given the same batch here, so that one process does the same."""
    module = LitSFT(str(folder / "llama"), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}] * 2
    make_trainer(tmp_path, max_steps=2).fit(module, loader(batches))
    sharded = AutoModelForCausalLM.from_pretrained(folder / "sft-sharded")
    assert sharded.config.architectures == ["LlamaForCausalLM"]
    for ours, theirs in zip(sharded.parameters(), module.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"FSDP2Strategy\(mixed_precision='half'\): must be 'bfloat16'"):
        FSDP2Strategy(mixed_precision="half")
