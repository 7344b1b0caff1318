"""AlignmentTax: the loss against the stock model's own, of which rows, when, and that it leaves no trace."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lit_ppo import TextDataModule
from lit_ppo.callbacks import AlignmentTax
from tests.helpers.spies import Recorder
from tests.helpers.toy import Toy
from tests.helpers.toy_data import ToyTexts
from tests.helpers.toy_runs import run_updates, trainer_of
from tests.helpers.toys import logged, make_data, make_module, make_trainer, texts
from tests.helpers.trick import Trick

TRICK = {
    "AlignmentTax": Trick(
        acts=lambda: {"data": ToyTexts(), "every": 2, "batches": 2},
        refuses={"data": "texts.jsonl", "every": 0, "batches": 0},
        knobs={
            "data": ({}, {"data": ToyTexts(seed=1)}),
            "every": ({}, {"every": 3}),
            "batches": ({}, {"batches": 3}),
        },
        live=lambda: {"data": TextDataModule("texts.jsonl", max_length=8, batch_size=3)},
        monitor=True,
    )
}


def watch(
    updates: int, folder: Path = Path(), data: Any = None, **options: Any
) -> tuple[Any, dict[str, dict[int, float]]]:
    """Tag -> step -> value."""
    logger = Recorder(folder)
    arguments = {"every": 2, "batches": 3, **options.pop("monitor", {})}
    module = run_updates(AlignmentTax(data or ToyTexts(), **arguments), updates, logger=logger, **options)
    found: dict[str, dict[int, float]] = {}
    for tag, value, step in logger.of("scalar"):
        found.setdefault(tag, {})[step] = value
    return module, found


def by_hand(actor: torch.nn.Module, rows: int) -> float:
    """The mean of -log p over the first rows' tokens."""
    data = ToyTexts()
    data.setup("fit")
    logits = torch.cat([actor(row["features"]) for row in data.rows[:rows]])
    return torch.nn.functional.cross_entropy(logits, torch.cat([row["actions"] for row in data.rows[:rows]])).item()


# ---- the loss, on the toy


@pytest.mark.parametrize(("batches", "rows"), [(1, 2), (2, 4), (3, 5), (9, 5)])
def test_the_loss_is_a_mean_over_the_tokens_of_the_first_rows(batches: int, rows: int):
    """Five texts in batches of two: the last has one, and counts half as much; the loader's own order has no say."""
    module, found = watch(1, monitor={"batches": batches})
    assert found["tax/loss"][0] == pytest.approx(by_hand(Toy().actor, rows), rel=1e-5)
    assert found["tax/loss"][1] == pytest.approx(by_hand(module.actor, rows), rel=1e-5)
    assert found["tax/loss_increase"][0] == 0.0
    change = by_hand(module.actor, rows) - by_hand(Toy().actor, rows)
    assert found["tax/loss_increase"][1] == pytest.approx(change, rel=1e-3)
    assert abs(change) > 1e-3


def test_of_the_policy_that_samples_every_second_update_and_at_the_end():
    """Step n is the policy after n updates, as it is of the scores; nothing is measured when it is not due."""
    asked: list[int] = []

    class Counting(Toy):
        def loss_on_text(self, batch: Any) -> tuple[float, int]:
            asked.append(int(self.updates))
            return super().loss_on_text(batch)

    _, found = watch(5, module=Counting())
    assert [*found["tax/loss"]] == [0, 2, 4, 5]
    assert asked == [step for step in (0, 2, 4, 5) for _ in range(3)]  # batches
    for n, loss in found["tax/loss"].items():
        assert loss == pytest.approx(by_hand(run_updates([], n).actor if n else Toy().actor, 5), rel=1e-5)


def test_validation_rows_come_first():
    class Split(ToyTexts):
        def val_dataloader(self) -> Any:
            return DataLoader(self.rows[3:], batch_size=2)

    class Empty(ToyTexts):
        def val_dataloader(self) -> Any:
            return []

    data = ToyTexts()
    data.setup("fit")
    expected = sum(Toy().loss_on_text(torch.utils.data.default_collate([row]))[0] for row in data.rows[3:]) / 2
    assert watch(1, data=Split())[1]["tax/loss"][0] == pytest.approx(expected, rel=1e-5)
    assert watch(1, data=Empty())[1]["tax/loss"][0] == pytest.approx(by_hand(Toy().actor, 5), rel=1e-5)


def test_rows_may_be_batches():
    class Batches(ToyTexts):
        def train_dataloader(self) -> Any:
            return DataLoader([torch.utils.data.default_collate(self.rows[i : i + 3]) for i in (0, 3)], batch_size=None)

    assert watch(1, data=Batches())[1]["tax/loss"][0] == pytest.approx(by_hand(Toy().actor, 5), rel=1e-5)


@pytest.mark.parametrize(("every", "logs"), [(1, True), (50, True), (50, False)])
def test_loggers_that_do_not_get_every_update_are_warned_of(tmp_path: Path, every: int, logs: bool):
    """Lightning's own default: it logs updates 49, 99, ..., and what was measured at 0, 50, ... is lost."""
    monitor = AlignmentTax(ToyTexts())
    trainer = trainer_of([monitor], 2, Recorder(tmp_path) if logs else None)
    trainer.log_every_n_steps = every
    words = r"AlignmentTax: Trainer\(log_every_n_steps=50\) can skip the updates that are measured; use"
    with pytest.warns(UserWarning, match=words) if logs and every > 1 else nullcontext():
        monitor.setup(trainer, Toy(), "fit")


# ---- on LitPPO


def stock_loss(folder: Path, model: Any) -> float:
    """Transformers' own loss on all texts at once: a mean over tokens."""
    data = texts(folder)
    data.tokenizer_source = str(model.name_or_path)
    data.setup("fit")
    with torch.no_grad():
        return float(model(**data.collate(data.train_rows)).loss)


@pytest.mark.parametrize("micro_batch_size", [1, None])
def test_litppos_loss_is_the_stock_models(tmp_path, lm, micro_batch_size):
    """Seven texts in batches of three."""
    module = make_module(lm, micro_batch_size=micro_batch_size, temperature=0.7)
    trainer = make_trainer(tmp_path, max_steps=3, callbacks=[AlignmentTax(texts(tmp_path), every=2)])
    trainer.fit(module, make_data(tmp_path))
    rows = logged(trainer)
    assert ["tax/loss" in row for row in rows] == [True, False, True]
    start = stock_loss(tmp_path, AutoModelForCausalLM.from_pretrained(lm).eval())
    end = stock_loss(tmp_path, module.actor.model)
    assert rows[0]["tax/loss"] == pytest.approx(start, rel=1e-5)
    assert rows[0]["tax/loss_increase"] == 0.0
    assert trainer.logger.rows[-1]["tax/loss"] == pytest.approx(end, rel=1e-5)
    assert trainer.logger.rows[-1]["tax/loss_increase"] == pytest.approx(end - start, rel=1e-3)
    assert not math.isclose(start, end, rel_tol=1e-3)


def test_litppo_reads_text_without_a_graph(tmp_path, lm):
    module, data = make_module(lm), texts(tmp_path)
    module.configure_model()
    data.tokenizer_source = str(lm)
    data.setup("fit")
    seen: list[bool] = []
    module.actor.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    module.loss_on_text(data.collate(data.train_rows))
    assert seen == [False] * 3  # seven texts, three at a time
    assert all(parameter.grad is None for parameter in module.parameters())
