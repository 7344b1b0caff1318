"""The chunked head against the plain formula, values and gradients."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from lit_ppo import head
from lit_ppo.head import HeadInputs, token_statistics


def inputs(n=11, hidden=5, vocab=7, seed=0) -> HeadInputs:
    g = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, hidden), (vocab, hidden), (vocab,))
    ]
    return HeadInputs(*(t.requires_grad_() for t in tensors))


@pytest.fixture(params=[10**9, 3 * 7], ids=["one chunk", "chunks of three"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_whole_distribution(temperature):
    ids = torch.arange(11) % 7
    ours, plain = inputs(), inputs()
    logprobs, entropy = token_statistics(ours, ids, temperature)
    distribution = Categorical(logits=(plain.states @ plain.weight.T + plain.bias) / temperature)
    torch.testing.assert_close(logprobs, distribution.log_prob(ids), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entropy, distribution.entropy(), rtol=1e-10, atol=1e-10)
    ramp = torch.linspace(-1, 2, 11, dtype=torch.float64)
    (logprobs * ramp + entropy * ramp.flip(0)).sum().backward()
    (distribution.log_prob(ids) * ramp + distribution.entropy() * ramp.flip(0)).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("_chunks")
def test_exact_kl_is_torchs_divergence():
    ours, ref = inputs(seed=0), inputs(seed=1)
    ref = HeadInputs(*(t.detach() for t in ref))
    logprobs, kl = token_statistics(ours, torch.arange(11) % 7, temperature=0.5, kl_to=ref)
    p = Categorical(logits=(ours.states @ ours.weight.T + ours.bias) / 0.5)
    q = Categorical(logits=(ref.states @ ref.weight.T + ref.bias) / 0.5)
    torch.testing.assert_close(kl, kl_divergence(p, q), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logprobs, p.log_prob(torch.arange(11) % 7), rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad(kl.sum(), ours.states, retain_graph=True)
    (expected,) = torch.autograd.grad(kl_divergence(p, q).sum(), ours.states)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-10)


def test_no_chunk_is_larger_than_the_limit(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 21)
    seen = []
    monkeypatch.setattr(head, "linear", lambda s, w, b: seen.append(len(s)) or torch.nn.functional.linear(s, w, b))
    with torch.no_grad():
        token_statistics(inputs(), torch.arange(11) % 7)
    assert seen == [3, 3, 3, 2]
