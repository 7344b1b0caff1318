"""PTXLoss: the gradient it adds against the stock model's own loss, and the order of its texts."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM

from lit_ppo import TextDataModule
from lit_ppo.callbacks import CriticWarmup, PTXLoss
from tests.helpers.command import REPOSITORY, run_command
from tests.helpers.ppo_command import ppo_arguments
from tests.helpers.tiny import WORDS
from tests.helpers.toy import Spy, Toy, ToyTexts, run_updates
from tests.helpers.toys import logged, make_data, make_module, make_trainer
from tests.helpers.trick import Trick
from tests.helpers.two_ranks import train_on_two

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


def test_the_share_is_of_the_whole_gradient():
    """Where PPO's own gradient vanishes (a weight of 1e6), the text's is all of it."""
    module = run_updates(PTXLoss(ToyTexts(), coef=1e6), episodes=4)
    assert module.steps[0]["ptx/grad_norm_share"] == pytest.approx(1.0, rel=1e-3)
    assert run_updates(PTXLoss(ToyTexts(), coef=1e-3), episodes=4).steps[0]["ptx/grad_norm_share"] < 0.01


def test_steps_without_an_actors_gradient_have_no_share():
    """Another callback has emptied the actor's losses: no step, and nothing to take a share of."""
    empty = Spy("on_actor_loss", lambda module, minibatch, losses: losses.clear())
    module = run_updates([PTXLoss(ToyTexts(), 0.5), empty])
    assert module.actors[0].equal(Toy().actor.weight)
    assert all("ptx/loss" in step and "ptx/grad_norm_share" not in step for step in module.steps)


def test_rests_while_the_actor_is_frozen():
    """The first text that is read afterwards is the first of all."""
    module = Reader()
    run_updates([CriticWarmup(2), PTXLoss(ToyTexts(), 0.5)], 3, module=module)
    assert module.read == read_in(1, ToyTexts())
    assert ["ptx/loss" in step for step in module.steps] == [False] * 4 + [True] * 2
    assert not any("ptx/grad_norm_share" in step for step in module.steps[:4])


def test_an_actor_that_freezes_later_reports_no_old_numbers():
    freeze = Spy("on_update_end", lambda module, experience: setattr(module, "actor_frozen", True))
    module = run_updates([PTXLoss(ToyTexts(), 0.5), freeze], 2)
    assert ["ptx/loss" in step for step in module.steps] == [True] * 2 + [False] * 2


# ---- the texts, on the toy


def test_every_epoch_has_each_text_once_in_a_new_order():
    """Five texts in batches of two: 2, 2, 1."""
    batches = read_in(6, ToyTexts())
    assert [len(batch) for batch in batches] == [2, 2, 1] * 4
    epochs = [[row for batch in batches[start : start + 3] for row in batch] for start in range(0, 12, 3)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_is_the_seeds():
    torch.manual_seed(5)
    first = read_in(3, ToyTexts(seed=3))
    torch.manual_seed(6)  # the global generator has no say
    assert read_in(3, ToyTexts(seed=3)) == first != read_in(3, ToyTexts(seed=4))


def test_without_a_seed_of_the_data_it_is_the_modules():
    def read(seed: int) -> list[list[int]]:
        module = Reader()
        module.seed = seed
        data = ToyTexts()
        del data.seed
        data.setup = lambda stage: setattr(data, "rows", made.rows)
        run_updates(PTXLoss(data, 0.5), 3, module=module)
        return module.read

    made = ToyTexts()
    made.setup("fit")
    assert read(3) == read(3) == read_in(3, ToyTexts(seed=3)) != read(4)
    other = Reader()
    other.seed = 4
    run_updates(PTXLoss(ToyTexts(seed=3), 0.5), 3, module=other)
    assert other.read == read(3)  # the data's own goes first


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


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_reads_on(stop: int, tmp_path: Path):
    """Stopped after 2, 4, 6 and 8 of three batches an epoch: inside the first and second, between, inside the third."""
    whole = read_in(5, ToyTexts())
    before = read_in(stop, ToyTexts(), save=tmp_path / "last.ckpt")
    after = read_in(5, ToyTexts(), resume=tmp_path / "last.ckpt")
    assert before + after == whole
    assert after != whole[: len(after)]


def test_the_datas_own_state_goes_along(tmp_path: Path):
    before, after = ToyTexts(), ToyTexts()
    before.pages = 7
    read_in(1, before, save=tmp_path / "last.ckpt")
    read_in(2, after, resume=tmp_path / "last.ckpt")
    assert after.pages == 7


def test_the_data_is_prepared_once_then_set_up_with_the_trainer():
    data = ToyTexts()
    read_in(2, data)
    assert data.calls == ["prepare_data", "setup fit with a trainer"]
    assert data.trainer is None  # afterwards


def test_nothing_is_read_but_to_train():
    data = ToyTexts()
    PTXLoss(data, 0.5).setup(L.Trainer(logger=False, barebones=True), Toy(), "validate")
    assert data.calls == []


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([1, 2])


@pytest.mark.parametrize(
    "loader",
    [
        [1, 2],
        DataLoader(Stream()),
        DataLoader(torch.arange(0)),  # type: ignore[arg-type]
        DataLoader([1, 2], batch_sampler=[[0], [1]]),  # type: ignore[arg-type]
    ],
    ids=["no loader", "no length", "no rows", "batches of its own"],
)
def test_other_loaders_are_refused_before_the_first_rollout(loader: Any):
    data, module = ToyTexts(), Toy()
    data.train_dataloader = lambda: loader
    with pytest.raises(ValueError, match=r"PTXLoss\(data=ToyTexts\): train_dataloader\(\) must return a DataLoader"):
        run_updates(PTXLoss(data, 0.5), module=module)
    assert module.experiences == []


def test_module_that_cannot_learn_from_text_is_refused_before_the_first_rollout():
    class Mute(Toy):
        backward_on_text = property()

    module = Mute()
    with pytest.raises(TypeError, match="PTXLoss needs backward_on_text on the module, which Mute lacks"):
        run_updates(PTXLoss(ToyTexts(), 0.5), module=module)
    assert module.experiences == []


# ---- on LitPPO


def write_texts(folder: Path) -> Path:
    """Seven texts of two to seven words."""
    rows = [{"text": " ".join(WORDS[i : i + 2 + i % 6])} for i in range(7)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "texts.jsonl"


def fit(folder: Path, lm: Path, *callbacks: L.Callback, max_steps: int = 1, **overrides: Any) -> tuple[Any, L.Trainer]:
    module = make_module(lm, **overrides)
    trainer = make_trainer(folder, callbacks=list(callbacks), max_steps=max_steps)
    trainer.fit(module, make_data(folder))
    return module, trainer


def texts(folder: Path, **options: Any) -> TextDataModule:
    return TextDataModule(str(write_texts(folder)), **{"max_length": 8, "batch_size": 7, "seed": 0} | options)


def test_litppos_step_is_ppos_plus_the_stock_models_gradient(tmp_path, lm):
    """One optimizer step of plain SGD at 0.1, on all seven texts at once; the tokenizer is the module's."""
    step = {"ppo_epochs": 1, "minibatch_size": 7}
    plain, _ = fit(tmp_path, lm, **step)
    data = texts(tmp_path)
    module, trainer = fit(tmp_path, lm, PTXLoss(data, coef=3.0), **step)
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


def test_the_text_is_learnt(tmp_path, lm):
    """Its loss falls, and further than under PPO alone."""
    losses = [row["ptx/loss"] for row in logged(fit(tmp_path, lm, PTXLoss(texts(tmp_path), 1.0), max_steps=6)[1])]
    idle = [row["ptx/loss"] for row in logged(fit(tmp_path, lm, PTXLoss(texts(tmp_path), 1e-9), max_steps=6)[1])]
    assert losses[-1] < losses[0] - 0.1
    assert losses[-1] < idle[-1] - 0.1


@pytest.mark.parametrize("split", [{"micro_batch_size": 1}, {"micro_batch_size": None}])
def test_weights_do_not_depend_on_the_micro_batches(tmp_path, lm, split):
    """Against micro-batches of three; texts of seven, three and one rows, two epochs of them in four updates."""
    runs = [
        fit(tmp_path, lm, PTXLoss(texts(tmp_path, batch_size=3), 0.5), max_steps=2, **options)
        for options in ({"micro_batch_size": 3}, split)
    ]
    (whole, first), (parts, second) = runs
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    for one, other in zip(logged(first), logged(second), strict=True):
        for name in ("ptx/loss", "ptx/grad_norm", "ptx/grad_norm_share"):
            assert other[name] == pytest.approx(one[name], rel=1e-4)


def test_any_number_of_ranks_goes_on_in_the_texts_but_with_no_other_batch(tmp_path, lm, monkeypatch):
    """The batch size is that of an optimizer step over all ranks, unlike that of data which ranks share out."""
    trick = PTXLoss(texts(tmp_path, batch_size=3), 0.5)
    _, trainer = fit(tmp_path, lm, trick)
    saved = []
    for world_size in (1, 2):
        monkeypatch.setattr(type(trainer), "world_size", world_size)
        trick.data.trainer = trainer
        saved.append(trick.state_dict())
    assert saved[0] == saved[1]
    trick.load_state_dict(saved[0])
    other = {"drawn": 1, "data": saved[0]["data"] | {"batch_size": 6}}
    with pytest.raises(ValueError, match=r"TextDataModule\(batch_size=3\): .* batch_size was 6"):
        trick.load_state_dict(other)


def test_no_logits_of_whole_texts(tmp_path, lm, monkeypatch):
    """The stock head, which would make (rows, tokens, vocabulary) of them, is never run."""
    module = make_module(lm)
    module.configure_model()
    module.actor.model.get_output_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("logits"))
    experience = make_module(lm).rollout(["the film", "a movie was", "it", "we", "they", "this", "that"])
    sampled = experience, None
    monkeypatch.setattr("lit_ppo.ppo.module.sample_responses", lambda *args, **kwargs: sampled)  # it uses the head
    trainer = make_trainer(tmp_path, callbacks=[PTXLoss(texts(tmp_path), 0.5)], max_steps=1)
    trainer.fit(module, make_data(tmp_path))
    assert "ptx/loss" in logged(trainer)[0]


def test_texts_beyond_the_models_positions_are_refused(tmp_path, lm):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "the film was " * 40}))
    data = TextDataModule(str(tmp_path / "long.jsonl"), max_length=100)
    with pytest.raises(
        ValueError, match=r"a text of 100 tokens exceeds the token limit of the actor, 64; lower .* max_len"
    ):
        fit(tmp_path, lm, PTXLoss(data, 0.5))


def test_the_commands_data_root_is_the_texts_too(tmp_path, tiny_lm, tiny_reward):
    """Beside a message that names the file where there is none."""
    folder = tmp_path / "data"
    folder.mkdir()
    overlay = REPOSITORY / "configs/tricks/ptx_loss.yaml"
    arguments = [*ppo_arguments(folder, tiny_lm, tiny_reward), "--config", str(overlay), "--data_root=data"]
    run_command("fit", *arguments, cwd=tmp_path).refused("TextDataModule(path='texts.jsonl')", "does not exist")
    write_texts(folder)
    run_command("fit", *arguments, "--trainer.max_steps=1", cwd=tmp_path).ok()


def two_rank_callbacks(folder: Path) -> list[L.Callback]:
    return [PTXLoss(TextDataModule(str(folder / "texts.jsonl"), max_length=8, batch_size=3, seed=0), 0.5)]


def test_two_ranks_read_and_learn_as_one(tmp_path, lm):
    """Batches of three and of one text, which two ranks do not divide."""
    write_texts(tmp_path)
    module, trainer = fit(tmp_path, lm, *two_rank_callbacks(tmp_path), max_steps=2)
    two = train_on_two(tmp_path, lm, callbacks=two_rank_callbacks)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(logged(trainer), two["logged"], strict=True):
        for name in ("ptx/loss", "ptx/grad_norm", "ptx/grad_norm_share"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name
