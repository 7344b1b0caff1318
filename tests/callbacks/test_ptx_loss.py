"""PTXLoss: the gradient it adds against the stock model's own loss, and the order of its texts."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lit_ppo import TextDataModule
from lit_ppo.callbacks import CriticWarmup, PTXLoss
from tests.helpers.command import REPOSITORY, run_command
from tests.helpers.ppo_command import ppo_arguments
from tests.helpers.recorder import record
from tests.helpers.spies import Spy
from tests.helpers.toy import Toy
from tests.helpers.toy_data import ToyTexts
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import logged, texts
from tests.helpers.trick import Trick

TRICK = {
    "PTXLoss": Trick(
        acts=lambda: {"data": ToyTexts(), "coef": 0.5},
        refuses={"data": "texts.jsonl", "coef": 0.0},
        knobs={"data": ({}, {"data": ToyTexts(seed=1)}), "coef": ({}, {"coef": 0.6})},
        live=lambda: {"data": TextDataModule("texts.jsonl", max_length=8, batch_size=3)},
    )
}


class Reader(Toy):
    """Notes which texts it learns from."""

    def __init__(self, **toy: Any) -> None:
        super().__init__(**toy)
        self.read: list[list[int]] = []

    def backward_on_text(self, batch: dict[str, Tensor], coef: float) -> tuple[float, float]:
        self.read.append(batch["row"].tolist())
        return super().backward_on_text(batch, coef)


def read_in(updates: int, data: ToyTexts, **options: Any) -> list[list[int]]:
    """Rows of each text batch; an update has two optimizer steps."""
    module = Reader()
    run_updates(PTXLoss(data, 0.5), updates, module=module, **options)
    return module.read


# ---- the loss, on the toy


def test_the_step_is_ppos_plus_the_texts():
    """One optimizer step at rate 0.05: the weights differ by 0.05 * 2 * the gradient of the mean of -log p."""
    plain = run_updates([], episodes=4)
    module = run_updates(PTXLoss(ToyTexts(shuffle=False), coef=2.0), episodes=4)
    data, start = ToyTexts(), Toy()
    data.setup("fit")
    logits = start.actor(torch.stack([row["features"] for row in data.rows[:2]])).flatten(0, 1)
    labels = torch.cat([row["actions"] for row in data.rows[:2]])
    loss = torch.nn.functional.cross_entropy(logits, labels)
    weight, bias = torch.autograd.grad(loss, start.actor.parameters())
    torch.testing.assert_close(module.actors[0], plain.actors[0] - 0.05 * 2.0 * weight, rtol=1e-5, atol=1e-6)
    (step,) = module.steps
    norm = 2.0 * float((weight.square().sum() + bias.square().sum()).sqrt())
    assert step["ptx/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert step["ptx/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert step["ptx/grad_norm_share"] == pytest.approx(norm / step["actor_grad_norm"], rel=1e-5)
    assert module.critics[0].equal(plain.critics[0])


def test_steps_without_an_actors_gradient_have_no_share():
    """Another callback has emptied the actor's losses: no step, and nothing to take a share of."""
    empty = Spy("on_actor_loss", lambda module, minibatch, losses: losses.clear())
    module = run_updates([PTXLoss(ToyTexts(), 0.5), empty])
    assert module.actors[0].equal(Toy().actor.weight)
    assert all("ptx/loss" in step and "ptx/grad_norm_share" not in step for step in module.steps)


def test_rests_while_the_actor_is_frozen():
    """For two updates, and in the last: the first text that is read in between is the first of all."""

    def freeze(module: Any, experience: Any) -> None:
        module.actor_frozen = module.actor_frozen or len(module.experiences) == 2

    module = Reader()
    run_updates([CriticWarmup(2), PTXLoss(ToyTexts(), 0.5), Spy("on_update_end", freeze)], 4, module=module)
    assert module.read == read_in(1, ToyTexts())
    for name in ("ptx/loss", "ptx/grad_norm", "ptx/grad_norm_share"):
        assert [name in step for step in module.steps] == [False] * 4 + [True] * 2 + [False] * 2


# ---- the texts, on the toy


def test_every_epoch_has_each_text_once_in_a_new_order():
    """Five texts in batches of two: 2, 2, 1."""
    batches = read_in(6, ToyTexts())
    assert [len(batch) for batch in batches] == [2, 2, 1] * 4
    epochs = [[row for batch in batches[start : start + 3] for row in batch] for start in range(0, 12, 3)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize(("own", "modules", "used"), [(3, 4, 3), (None, 4, 4), (None, None, 0)])
def test_the_order_is_that_of_the_datas_seed_else_of_the_modules(own: int | None, modules: int | None, used: int):
    """The global generator has no say."""

    def read(data: ToyTexts, seed: int | None, modules_seed: int | None) -> list[list[int]]:
        data.setup("fit")
        data.seed, data.setup, module = seed, lambda stage: None, Reader()
        module.seed = modules_seed
        run_updates(PTXLoss(data, 0.5), 3, module=module)
        return module.read

    torch.manual_seed(own or 5)
    assert read(ToyTexts(), own, modules) == read(ToyTexts(), used, None) != read(ToyTexts(), used + 1, None)


def test_a_second_fit_reads_on_by_the_data_that_it_is_given():
    """The third batch of the first epoch and the first of the second."""
    trick, module = PTXLoss(ToyTexts(seed=1), 0.5), Reader()
    run_updates(trick)
    trick.data = ToyTexts(seed=3)
    run_updates(trick, module=module)
    assert module.read == read_in(2, ToyTexts(seed=3))[2:]
    assert module.read[0] != read_in(2, ToyTexts(seed=1))[2]


def test_a_loader_that_does_not_shuffle_is_read_as_it_comes():
    assert read_in(3, ToyTexts(shuffle=False)) == [[0, 1], [2, 3], [4]] * 2


def test_rows_may_be_batches():
    """``batch_size=None``, as Lightning users hand over ready batches."""

    class Batches(ToyTexts):
        def train_dataloader(self) -> DataLoader[Any]:
            batches = [torch.utils.data.default_collate(self.rows[i : i + 3]) for i in (0, 2)]
            return DataLoader(batches, batch_size=None)

    assert read_in(2, Batches()) == [[0, 1, 2], [2, 3, 4]] * 2


def test_the_datas_own_state_goes_along(tmp_path: Path):
    before, after = ToyTexts(), ToyTexts()
    before.pages = 7
    read_in(1, before, save=tmp_path / "last.ckpt")
    read_in(2, after, resume=tmp_path / "last.ckpt")
    assert after.pages == 7


# ---- on LitPPO


def test_litppos_step_is_ppos_plus_the_stock_models_gradient(tmp_path, lm):
    """One optimizer step of plain SGD at 0.1, on all seven texts at once; the tokenizer is the module's."""
    data = texts(tmp_path)
    data.batch_size = 7
    plain, _, _ = record(tmp_path, lm, max_steps=1, ppo_epochs=1, minibatch_size=7)
    module, _, trainer = record(tmp_path, lm, PTXLoss(data, coef=3.0), max_steps=1, ppo_epochs=1, minibatch_size=7)
    stock = AutoModelForCausalLM.from_pretrained(lm).eval()
    loss = stock(**data.collate(data.train_rows)).loss
    loss.backward()
    ours, theirs = (dict(m.actor.model.named_parameters()) for m in (module, plain))
    for name, parameter in stock.named_parameters():
        expected = theirs[name] - 0.1 * 3.0 * parameter.grad
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-6)
    (row,) = logged(trainer)
    norm = 3.0 * float(torch.nn.utils.get_total_norm([p.grad for p in stock.parameters()]))
    assert row["ptx/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["ptx/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert row["ptx/grad_norm_share"] == pytest.approx(norm / row["policy/grad_norm"], rel=1e-4)


def test_a_checkpoint_has_the_batch_size_of_a_step_whatever_the_number_of_ranks(tmp_path, lm):
    """Unlike that of data which ranks share out."""
    data = texts(tmp_path)
    data.tokenizer_source = str(lm)
    data.setup("fit")
    for ranks in (1, 2):
        data.trainer = SimpleNamespace(world_size=ranks, datamodule=None)
        assert PTXLoss(data, 0.5).state_dict()["data"]["batch_size"] == 3


def test_texts_beyond_the_models_positions_are_refused(tmp_path, lm):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "the film was " * 40}))
    data = TextDataModule(str(tmp_path / "long.jsonl"), max_length=100)
    with pytest.raises(ValueError, match=r"a text of 100 tokens exceeds the token limit of the actor, 64; lower .*max"):
        record(tmp_path, lm, PTXLoss(data, 0.5))


def test_the_commands_data_root_is_the_texts_too(tmp_path, tiny_lm, tiny_reward):
    folder = tmp_path / "data"
    folder.mkdir()
    texts(folder)
    arguments = [*ppo_arguments(folder, tiny_lm, tiny_reward), "--data_root=data", "--trainer.max_steps=1"]
    run_command("fit", *arguments, "--config", REPOSITORY / "configs/tricks/ptx_loss.yaml", cwd=tmp_path).ok()
