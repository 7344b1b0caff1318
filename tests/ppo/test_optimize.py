"""Skipped steps, text gradients, the exact KL: what the update offers beyond PPO's own losses."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_ppo.ppo.optimize import NonFiniteError
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import logged, make_data, make_module, make_trainer


class Poison(L.Callback):
    """Makes the actor's loss NaN in some optimizer steps, counted from 0."""

    def __init__(self, *steps: int, critic: bool = False) -> None:
        self.steps, self.step, self.critic = steps, -1, critic

    def on_minibatch_start(self, trainer: Any, pl_module: Any, minibatch: Any) -> None:
        self.step += 1

    def on_actor_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
        if self.step in self.steps and not self.critic:
            losses["policy"] = losses["policy"] * torch.nan

    def on_critic_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
        if self.step in self.steps and self.critic:
            losses["value"] = losses["value"] * torch.nan


def fit(tmp_path, actor, *callbacks, max_steps=1, **overrides):
    module = make_module(actor, **overrides)
    trainer = make_trainer(tmp_path, callbacks=list(callbacks), max_steps=max_steps)
    trainer.fit(module, make_data(tmp_path))
    return module, trainer


def test_the_first_non_finite_loss_stops_the_run_with_the_batchs_facts(tmp_path, tiny_lm):
    facts = r"update 1: policy_loss=nan.* is not finite; 7 responses .*max_skipped_steps=0"
    with pytest.raises(NonFiniteError, match=facts):
        fit(tmp_path, tiny_lm, Poison(0))


def test_a_non_finite_critic_stops_the_run_too(tmp_path, tiny_lm):
    with pytest.raises(NonFiniteError, match=r"value_loss=nan"):
        fit(tmp_path, tiny_lm, Poison(0, critic=True))


def test_allowed_skips_leave_the_weights_alone_and_are_counted(tmp_path, tiny_lm):
    """Four steps, the first and third poisoned: never two in a row."""
    module, trainer = fit(tmp_path, tiny_lm, Poison(0, 2), max_skipped_steps=1)
    row = logged(trainer)[0]
    assert row["optimizer/skipped_fraction"] == 0.5
    assert all(math.isfinite(value) for value in row.values())
    assert trainer.global_step == 1
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_all_steps_skipped_still_count_as_one_update(tmp_path, tiny_lm):
    module, trainer = fit(tmp_path, tiny_lm, Poison(*range(4)), max_skipped_steps=4)
    assert trainer.global_step == 1
    start = make_module(tiny_lm)
    start.configure_model()
    assert all(value.equal(start.state_dict()[name]) for name, value in module.state_dict().items())


def test_more_in_a_row_than_allowed_end_the_run(tmp_path, tiny_lm):
    with pytest.raises(NonFiniteError, match="2 optimizer steps in a row"):
        fit(tmp_path, tiny_lm, Poison(1, 2), max_skipped_steps=1)


def test_a_non_finite_gradient_behind_a_finite_loss_is_caught(tmp_path, tiny_lm):
    class Root(L.Callback):
        def on_actor_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
            losses["root"] = minibatch.mean((minibatch.new_logprobs - minibatch.logprobs.detach()).abs().sqrt() * 0.0)

    with pytest.raises(NonFiniteError, match="actor_grad_norm=nan"):
        fit(tmp_path, tiny_lm, Root())


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_text_gradients_are_those_of_the_stock_loss(tmp_path, tiny_lm, micro_batch_size):
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
        fit(tmp_path, tiny_lm, Text(), micro_batch_size=micro_batch_size)
    results, ours = seen[0]
    for got_loss, got_norm in results:  # the second on top of the first reports its own part
        assert got_loss == pytest.approx(loss.item(), rel=1e-5)
        assert got_norm == pytest.approx(norm, rel=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(ours[name], 2 * grad, rtol=1e-4, atol=1e-6)


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
    module = make_module(tiny_lm)
    module.configure_model()
    module.trainer = make_trainer(tmp_path)
    module.manual_backward = lambda loss: loss.backward()
    assert module.backward_on_text(text, 1.0)[0] == pytest.approx(sum(sums) / 3, rel=1e-5)


def test_text_without_anything_to_predict_adds_nothing(tmp_path, tiny_lm):
    ids = torch.tensor([[5, 6, 7]])
    module = make_module(tiny_lm)
    module.configure_model()
    module.trainer = make_trainer(tmp_path)
    module.manual_backward = lambda loss: loss.backward()
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    assert module.backward_on_text(text, 1.0) == (0.0, 0.0)


def test_shifted_labels_are_refused(tiny_lm):
    module = make_module(tiny_lm)
    module.configure_model()
    ids = torch.tensor([[5, 6, 7]])
    shifted = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([[6, 7, -100]])}
    with pytest.raises(ValueError, match="backward_on_text: labels must be input_ids, or -100"):
        module.backward_on_text(shifted, 1.0)


def test_exact_kl_is_the_sum_over_the_vocabulary(tmp_path):
    actor = make_causal_lm(tmp_path / "a", seed=0, scale=4.0)
    reference = make_causal_lm(tmp_path / "r", seed=1, scale=4.0)
    module = make_module(actor, reference=str(reference), temperature=0.7)
    experience = module.rollout(["the film", "a movie was", "plot"])
    minibatch = next(experience.minibatches(3, epochs=1, seed=(0,), reduction="token_mean"))
    kl = module.exact_kl(minibatch)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (actor, reference)]
    for i in range(3):
        prompt = minibatch.prompt_ids[i][minibatch.prompt_mask[i]]
        response = minibatch.response_ids[i][minibatch.response_mask[i]]
        ids = torch.cat([prompt, response])[None]
        p, q = (torch.log_softmax(m(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.7, -1) for m in models)
        torch.testing.assert_close(kl[i, : len(response)], (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
        assert kl[i, len(response) :].eq(0).all()
    kl.sum().backward()
    assert all(p.grad is not None for p in module.actor.parameters())


def test_exact_kl_needs_a_reference(tiny_lm):
    module = make_module(tiny_lm, reference=None)
    module.configure_model()
    with pytest.raises(ValueError, match="exact_kl: there is no reference"):
        module.exact_kl(None)
