"""Steps that are skipped, and the exact KL."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_ppo.functional import random_projection
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


@pytest.mark.parametrize("loss", ["policy", "value"])
def test_the_first_non_finite_loss_stops_the_run_with_the_batchs_facts(tmp_path, tiny_lm, loss):
    facts = rf"update 1: .*{loss}_loss=nan.* is not finite; 7 responses .*max_skipped_steps=0"
    with pytest.raises(NonFiniteError, match=facts):
        fit(tmp_path, tiny_lm, Poison(0, critic=loss == "value"))


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


@pytest.mark.parametrize("n_states", [1000, 5])
def test_critic_states_are_those_of_the_plain_model(tmp_path, n_states):
    """All of them, or the fixed projections of them; whatever the padding and the micro-batch."""
    actor = make_causal_lm(tmp_path / "a", seed=0, scale=4.0)
    module = make_module(actor, micro_batch_size=2)
    module.n_critic_states = n_states
    experience = module.rollout(["the film", "a movie was", "plot"])
    assert "critic_states" not in module.rollout(["plot"], stream="held out").extras
    states = experience.extras["critic_states"]
    plain = AutoModelForCausalLM.from_pretrained(actor).eval().base_model
    for i in range(3):
        prompt = experience.prompt_ids[i][experience.prompt_mask[i]]
        response = experience.response_ids[i][experience.response_mask[i]]
        with torch.no_grad():
            expected = plain(torch.cat([prompt, response])[None]).last_hidden_state[0, len(prompt) - 1 : -1]
        expected = random_projection(expected, n_states)
        assert expected.shape[-1] == min(n_states, plain.config.hidden_size)
        torch.testing.assert_close(states[i, : len(response)], expected, rtol=1e-4, atol=1e-5)
        assert states[i, len(response) :].eq(0).all()


def test_exact_kl_needs_a_reference(tiny_lm):
    module = make_module(tiny_lm, reference=None)
    module.configure_model()
    with pytest.raises(ValueError, match="exact_kl: there is no reference"):
        module.exact_kl(None)


def test_optimizers_step_outside_of_autocast(tmp_path, tiny_lm):
    """An optimizer with products of its own gets the bits of its tensors: 257 has nine, bfloat16 keeps eight."""
    found = []

    class Product(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            found.append((torch.ones(1, 257) @ torch.ones(257, 1)).item())
            super().step(closure)

    module = make_module(tiny_lm, actor_optimizer=lambda params: Product(params, lr=0.1))
    make_trainer(tmp_path, precision="bf16-mixed").fit(module, make_data(tmp_path))
    assert found
    assert set(found) == {257.0}
