"""KLLoss: values by hand, gradients against finite differences, enumeration and stock models."""

import math
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_ppo.callbacks import KLLoss
from lit_ppo.parallel.ranks import my_micro_batches
from lit_ppo.ppo import optimize
from tests.helpers.experiences import make_micro_batch
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import logged, make_data, make_module, make_trainer
from tests.helpers.trick import Trick

TRICK = {
    "KLLoss": Trick(
        acts={"coef": 0.5},
        refuses={"coef": 0.0, "kind": "k1", "to": "sampled"},
        knobs={
            "coef": ({}, {"coef": 0.4}),
            "kind": ({}, {"kind": "exact"}),
            "to": ({}, {"to": "old"}),
        },
        needs="reference",
    )
}

NAN = float("nan")
LOG_2 = math.log(2.0)


@pytest.mark.parametrize(
    ("kind", "to", "kl"),
    [
        ("k2", "reference", (LOG_2**2 + LOG_2**2 / 2) / 3),  # log(new / other) is log 2, log 2 and -log 2
        ("k3", "reference", ((0.5 - 1 + LOG_2) * 2 + (2 - 1 - LOG_2)) / 3),  # other / new - 1 + log(new / other)
        ("k3", "old", ((2 - 1 - LOG_2) * 2 + (0.5 - 1 + LOG_2)) / 3),  # new / old - 1 + log(old / new)
    ],
)
def test_loss_is_coef_times_the_mean_over_response_tokens(kind: Any, to: Any, kl: float):
    """Tokens twice, twice and half as likely as under the other policy; k2 of each is log(2)^2 / 2."""
    new = torch.tensor([[-1.0, NAN], [-2.0, -3.0]], dtype=torch.float64)
    others = {"reference": "ref_logprobs", "old": "logprobs"}
    fields = {others[to]: new - torch.tensor([[LOG_2, NAN], [LOG_2, -LOG_2]])}
    micro = make_micro_batch(torch.tensor([[True, False], [True, True]]), new_logprobs=new, **fields)
    losses = {"policy": torch.tensor(1.0)}
    KLLoss(0.1, kind, to).on_actor_loss(None, None, micro, losses)
    assert {name: loss.item() for name, loss in losses.items()} == {"policy": 1.0, "kl": pytest.approx(0.1 * kl)}


@pytest.mark.parametrize(
    ("kind", "to", "expected"), [("k2", "reference", "forward"), ("k3", "reference", "backward"), ("k3", "old", "old")]
)
def test_which_divergence_each_kind_descends(kind: Any, to: Any, expected: str):
    """Every token once, weighted by its probability under the policy that sampled, is the expectation itself."""
    random = torch.Generator().manual_seed(0)
    logits, ref_logits, moved = (torch.randn(6, generator=random, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    new, ref, old = logits.log_softmax(-1), ref_logits.log_softmax(-1), moved.log_softmax(-1)
    sampled = (old if to == "old" else new).detach()
    micro = SimpleNamespace(
        new_logprobs=new[None], ref_logprobs=ref[None], logprobs=sampled[None], mean=lambda x: (sampled.exp() * x).sum()
    )
    losses: dict[str, Tensor] = {}
    KLLoss(1.0, kind, to).on_actor_loss(None, None, micro, losses)
    divergence = {
        "forward": (new.exp() * (new - ref)).sum(),
        "backward": (ref.exp() * (ref - new)).sum(),
        "old": (old.exp() * (old - new)).sum(),
    }[expected]
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (losses["kl"], divergence))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_old_policy_needs_no_reference_and_the_reference_is_no_old_policy():
    """In the first step of an update nothing has left the old policy; the reference is another from the start."""
    old = run_updates(KLLoss(0.5, to="old"), 2, reference=False)
    assert [losses["kl"] == 0.0 for losses in old.losses] == [True, False, True, False]
    reference = run_updates(KLLoss(0.5), 2)
    assert all(losses["kl"] > 0.0 for losses in reference.losses)


class TermAlone(L.Callback):
    """Leaves the KL term as the actor's only loss, and keeps step and gradients of the first update."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_actor_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: dict[str, Tensor]) -> None:
        del losses["policy"]

    def on_minibatch_end(self, trainer: Any, pl_module: Any, experience: Any, metrics: dict[str, float]) -> None:
        self.experience, self.metrics = experience, metrics
        self.gradients = {name: p.grad.clone() for name, p in pl_module.actor.model.named_parameters()}
        experience.exhausted = True


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [make_causal_lm(folder / str(seed), seed=seed, scale=4.0) for seed in range(2)]


def brute_force(kind: str, experience: Any, models: Any, temperature: float) -> tuple[float, dict[str, Tensor]]:
    """Mean KL to the reference over all tokens and its gradient, of stock models in float64, a row at a time."""
    actor, reference = (AutoModelForCausalLM.from_pretrained(path).double().eval() for path in models)
    terms = []
    for i in range(len(experience)):
        prompt = experience.prompt_ids[i][experience.prompt_mask[i]]
        response = experience.response_ids[i][experience.response_mask[i]]
        if not len(response):
            continue
        ids = torch.cat([prompt, response])[None]
        p, q = (
            torch.log_softmax(m(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature, -1)
            for m in (actor, reference)
        )
        d = (p - q).gather(-1, response[:, None]).squeeze(-1)
        terms.append({"exact": (p.exp() * (p - q)).sum(-1), "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind])
    kl = torch.cat(terms).mean()
    gradients = torch.autograd.grad(kl, list(actor.parameters()))
    return kl.item(), dict(zip((name for name, _ in actor.named_parameters()), gradients, strict=True))


class Holes(L.Callback):
    """Masks a response out as a whole: with micro-batches of one, one of them has no tokens."""

    def on_rollout_end(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        experience.response_mask = experience.response_mask & (torch.arange(len(experience)) != 4)[:, None]


@pytest.mark.parametrize(("kind", "micro_batch_size"), [("k2", 1), ("k3", 7), ("exact", 1), ("exact", 3)])
def test_gradient_on_the_real_module_is_that_of_stock_models(tmp_path, models, kind, micro_batch_size, monkeypatch):
    """Whatever the micro-batches, an empty one (a row of zero weight) and one without tokens among them."""
    module = make_module(
        models[0], reference=str(models[1]), minibatch_size=7, micro_batch_size=micro_batch_size, temperature=0.7
    )
    # as beside a busier rank
    monkeypatch.setattr(optimize, "my_micro_batches", lambda *args, **limits: [*my_micro_batches(*args, **limits), []])
    alone = TermAlone()
    trainer = make_trainer(tmp_path, callbacks=[Holes(), KLLoss(0.3, kind), alone], max_steps=1)
    trainer.fit(module, make_data(tmp_path))
    kl, gradients = brute_force(kind, alone.experience, models, temperature=0.7)
    assert kl > 0.1
    assert alone.metrics["policy/kl_loss"] == pytest.approx(0.3 * kl, rel=1e-4)
    assert logged(trainer)[0]["policy/kl_loss"] == pytest.approx(0.3 * kl, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(alone.gradients[name].double(), 0.3 * gradient, rtol=1e-3, atol=1e-5)
