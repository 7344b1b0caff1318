"""The next-token loss on text batches: its gradients are those of the stock model."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.recorder import record
from tests.helpers.toys import make_module, make_trainer


def test_text_gradients_are_those_of_the_stock_loss(tmp_path, tiny_lm):
    """``coef`` times the mean next-token loss over all tokens of the batch, whatever the micro-batches."""
    text = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0], [12, 13, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]),
    }
    text["labels"] = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
    stock = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    loss = stock(**text).loss
    grads = dict(
        zip((n for n, _ in stock.named_parameters()), torch.autograd.grad(2.5 * loss, stock.parameters()), strict=True)
    )
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    seen: list[Any] = []

    class Text(L.Callback):
        def on_minibatch_start(self, trainer: Any, pl_module: Any, minibatch: Any) -> None:
            twice = pl_module.backward_on_text(text, 2.5), pl_module.backward_on_text(text, 2.5)
            seen.append((twice, {n: p.grad.clone() for n, p in pl_module.actor.model.named_parameters()}))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        record(tmp_path, tiny_lm, Text(), micro_batch_size=2)
    results, ours = seen[0]
    for got_loss, got_norm in results:  # the second on top of the first reports its own part
        assert got_loss == pytest.approx(loss.item(), rel=1e-5)
        assert got_norm == pytest.approx(norm, rel=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(ours[name], 2 * grad, rtol=1e-4, atol=1e-6)


def ready(folder: Path, lm: Path) -> Any:
    """A module with its models, as in a run."""
    module: Any = make_module(lm)
    module.configure_model()
    module.trainer = make_trainer(folder)
    module.manual_backward = lambda loss: loss.backward()
    return module


def test_gradients_averaged_over_ranks_are_those_of_the_stock_loss(tmp_path, tiny_lm, monkeypatch):
    """Two ranks, one of which has a micro-batch without rows."""
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 4], [12, 13, 3, 3]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    stock = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    (2.5 * stock(**text).loss).backward()
    monkeypatch.setattr("lit_ppo.ppo.text_loss.n_ranks", lambda: 2)
    on_rank = []
    for share in ([[0, 1]], [[2], []]):
        monkeypatch.setattr("lit_ppo.ppo.text_loss.my_micro_batches", lambda *_, share=share, **__: share)
        module = ready(tmp_path, tiny_lm)
        module.backward_on_text(text, 2.5)
        on_rank.append({name: p.grad for name, p in module.actor.model.named_parameters()})
    for name, p in stock.named_parameters():
        torch.testing.assert_close((on_rank[0][name] + on_rank[1][name]) / 2, p.grad, rtol=1e-4, atol=1e-6)


def test_text_may_be_padded_on_the_left_and_need_not_predict_all(tmp_path, tiny_lm):
    """The stock loss of each row alone; a row's first token has no prediction, whatever its label says."""
    text = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [0, 0, 12, 13]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
        "labels": torch.tensor([[5, -100, 7, 8], [-100, -100, 12, 13]]),
    }
    stock = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    sums = [
        stock(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() * n
        for ids, labels, n in (([5, 6, 7, 8], [5, -100, 7, 8], 2), ([12, 13], [12, 13], 1))
    ]
    assert ready(tmp_path, tiny_lm).backward_on_text(text, 1.0)[0] == pytest.approx(sum(sums) / 3, rel=1e-5)


def test_text_without_anything_to_predict_adds_nothing(tmp_path, tiny_lm):
    ids = torch.tensor([[5, 6, 7]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    assert ready(tmp_path, tiny_lm).backward_on_text(text, 1.0) == (0.0, 0.0)


def test_shifted_labels_are_refused(tmp_path, tiny_lm):
    module = ready(tmp_path, tiny_lm)
    ids = torch.tensor([[5, 6, 7]])
    shifted = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([[6, 7, -100]])}
    with pytest.raises(ValueError, match="backward_on_text: labels must be input_ids, or -100"):
        module.backward_on_text(shifted, 1.0)
