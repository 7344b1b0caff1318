"""Models in shares: built without whole copies, loaded bit for bit, exchanging gradients once a step, saved whole."""

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lit_ppo import FSDP2Strategy, LitSFT, TextDataModule
from lit_ppo.checkpoint import StepCheckpoint
from lit_ppo.distributed import n_ranks, rank
from lit_ppo.export import ExportModel
from lit_ppo.models import Actor, Reference, load_causal_lm
from lit_ppo.rewards import RewardModel
from lit_ppo.sharding import blocks, build, gathered, shard, whole_weights
from tests.equivalence import CPUFSDP
from tests.ranks import on_ranks
from tests.tiny import make_causal_lm, make_reward_model, make_tokenizer
from tests.toys import logged, make_data, make_module, make_trainer

FAMILIES = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "tied llama": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MASK = torch.tensor([[False, True, True, True], [True, True, True, True]])
TARGETS = torch.tensor([[True, True], [True, True]])


class Strategy:
    """As much of a strategy as building and sharding ask for."""

    root_device = torch.device("cpu")

    def __init__(self, **options: Any) -> None:
        self.strategy = FSDP2Strategy(**options)
        self.strategy._device_mesh = dist.init_device_mesh("cpu", (n_ranks(), 1), mesh_dim_names=("data_parallel", "x"))
        self.strategy.parallel_devices = [self.root_device] * n_ranks()
        self.strategy.shard.__func__  # the real one
        self.shard = self.strategy.shard


# On each rank


def load_families(folder: Path) -> None:
    warnings.simplefilter("ignore")
    most = 0

    class Watched(Strategy):
        """Notes how much of the model lies whole on this rank at a time."""

        def __init__(self) -> None:
            super().__init__()
            self.most = 0
            self.shard = self.watch

        def watch(self, module: Any, **options: Any) -> Any:
            whole = sum(p.numel() for p in self.model.parameters() if not isinstance(p, DTensor) and not p.is_meta)
            self.most = max(self.most, whole)
            return self.strategy.shard(module, **options)

    for name in FAMILIES:
        stock = AutoModelForCausalLM.from_pretrained(folder / name)
        with torch.no_grad():
            expected = Reference(stock)(IDS, MASK, target_mask=TARGETS)
        strategy = Watched()
        strategy.model = build(strategy, lambda name=name: Actor(load_causal_lm("actor", str(folder / name), {})))
        assert all(p.is_meta for p in strategy.model.parameters()) == (rank() > 0)
        size = sum(p.numel() for p in strategy.model.parameters())
        actor = shard(strategy, strategy.model)
        assert len(blocks(stock)) == 2
        if rank() > 0:
            assert strategy.most < 0.8 * size, "this rank held a whole copy"
        held = sum(p.to_local().numel() for p in actor.parameters())
        assert held < 0.6 * size
        with torch.no_grad():
            found = actor(IDS, MASK, target_mask=TARGETS)
        assert all(ours.equal(theirs) for ours, theirs in zip(found, expected, strict=True)), name
        whole = whole_weights(actor, "model.")
        if rank() == 0:
            own = stock.state_dict()
            assert whole.keys() == own.keys()
            assert all(whole[key].equal(tensor) for key, tensor in own.items())
            tied = [len({state[key].data_ptr() for key in state}) for state in (whole, own)]
            assert tied[0] == tied[1], name
        with gathered(actor):
            buffers, theirs = dict(actor.model.named_buffers()), dict(stock.named_buffers())
            assert buffers.keys() == theirs.keys()
            assert all(buffers[key].equal(tensor) and not tensor.is_meta for key, tensor in theirs.items())
            assert all(p.equal(q) for p, q in zip(actor.model.parameters(), stock.parameters(), strict=True))
            assert sum(p.numel() for p in actor.parameters()) == size
        assert all(isinstance(p, DTensor) for p in actor.parameters()), "still whole after sampling"
        most = max(most, strategy.most)
        embedding = actor.model.get_input_embeddings().weight
        assert (embedding is actor.model.get_output_embeddings().weight) == stock.config.tie_word_embeddings


def fail_on_the_first(folder: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"actor='nowhere': no such folder") as caught:
        build(Strategy(), lambda: Actor(load_causal_lm("actor", "nowhere", {})))
    assert ("rank 0 failed" in str(caught.value)) == (rank() > 0)


def count_collectives(folder: Path) -> None:
    warnings.simplefilter("ignore")
    counted = {}
    for name in ("fsdp2", "each", "ddp"):
        for micro_batch_size in (1, 2):
            strategy = FSDP2Strategy(sync_every_micro_batch=True) if name == "each" else name
            module: Any = make_module(folder / "gpt2", micro_batch_size=micro_batch_size, minibatch_size=8, ppo_epochs=1)
            trainer = make_trainer(folder, devices=n_ranks(), strategy=strategy, max_steps=1)
            with Counting() as counting:
                step = module.backward_minibatch

                def counted_step(minibatch: Any, step: Any = step, counting: Any = counting) -> Any:
                    counting.n.clear()
                    metrics = step(minibatch)
                    counting.of_step = dict(counting.n)
                    return metrics

                module.backward_minibatch = counted_step
                trainer.fit(module, make_data(folder, batch_size=8))
            counted[name, micro_batch_size] = counting.of_step
    if rank() == 0:
        torch.save(counted, folder / "counted.pt")


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.n: dict[str, int] = {}
        self.of_step: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function.__name__.split(".")[0]
            self.n[name] = self.n.get(name, 0) + 1
        return function(*args, **kwargs or {})
