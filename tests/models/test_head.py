"""The chunked head against the plain formula, values and gradients."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from lit_ppo.functional import float32_linear, token_sums, token_sums_gradient
from lit_ppo.models import head
from lit_ppo.models.head import HeadInputs, token_statistics


def inputs(n=11, hidden=5, vocab=7, seed=0) -> HeadInputs:
    g = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, hidden), (vocab, hidden), (vocab,))
    ]
    return HeadInputs(*(t.requires_grad_() for t in tensors))


# elements of a chunk, and of what is kept of all: 11 tokens are 77 elements, three of them 21; rows that are added
@pytest.fixture(
    params=[(10**9, 10**9, 0), (21, 10**9, 0), (21, 45, 0), (21, 0, 0), (21, 45, 4)],
    ids=["one chunk", "chunks of three", "two chunks kept", "none kept", "filled up"],
)
def _chunks(request, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", request.param[0])
    monkeypatch.setattr(head, "KEPT_ELEMENTS", request.param[1])
    monkeypatch.setattr(head, "product_rows", lambda n, device: n + request.param[2])


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_whole_distribution(temperature, compiled, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    head._compiled.cache_clear()
    ids = torch.arange(11) % 7
    ours, plain = inputs(), inputs()
    logprobs, entropy = token_statistics(ours, ids, temperature, compiled=compiled)
    distribution = Categorical(logits=(plain.states @ plain.weight.T + plain.bias) / temperature)
    torch.testing.assert_close(logprobs, distribution.log_prob(ids), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(entropy, distribution.entropy(), rtol=1e-10, atol=1e-10)
    ramp = torch.linspace(-1, 2, 11, dtype=torch.float64)
    (logprobs * ramp + entropy * ramp.flip(0)).sum().backward()
    (distribution.log_prob(ids) * ramp + distribution.entropy() * ramp.flip(0)).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("wanted", [0, 1])
def test_compiled_code_takes_one_gradient_alone_and_tokens_that_cannot_occur(wanted):
    """A logit of -inf; the entropy of the others is that without it."""
    logits = torch.tensor([[0.5, -torch.inf, 2.0], [1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([2, 0])
    plain = logits.log_softmax(-1)
    entropies = [Categorical(logits=logits[0, [0, 2]]).entropy(), Categorical(logits=logits[1]).entropy()]
    expected = plain[[0, 1], ids], -torch.stack(entropies)
    logprobs, negative_entropy, log_sum = token_sums(logits.detach(), ids, 1.0)
    torch.testing.assert_close((logprobs, negative_entropy), tuple(x.detach() for x in expected))
    (gradient,) = torch.autograd.grad(expected[wanted].sum(), logits)
    ones: list[Any] = [None, None]
    ones[wanted] = torch.ones(2, dtype=torch.float64)
    found = token_sums_gradient(logits.detach(), ids, (negative_entropy, log_sum), *ones, 1.0, torch.float64)
    torch.testing.assert_close(found, gradient.nan_to_num())


@pytest.mark.usefixtures("_chunks")
def test_exact_kl_is_torchs_divergence():
    ours, ref = inputs(seed=0), inputs(seed=1)
    ref = HeadInputs(*(t.detach() for t in ref))
    logprobs, kl = token_statistics(ours, torch.arange(11) % 7, temperature=0.5, kl_to=ref)
    p = Categorical(logits=(ours.states @ ours.weight.T + ours.bias) / 0.5)
    q = Categorical(logits=(ref.states @ ref.weight.T + ref.bias) / 0.5)
    torch.testing.assert_close(kl, kl_divergence(p, q), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logprobs, p.log_prob(torch.arange(11) % 7), rtol=1e-10, atol=1e-10)
    ramp = torch.linspace(-1, 2, 11, dtype=torch.float64)
    gradients = torch.autograd.grad((kl * ramp + logprobs).sum(), ours, retain_graph=True)
    expected = torch.autograd.grad((kl_divergence(p, q) * ramp + p.log_prob(torch.arange(11) % 7)).sum(), ours)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("_chunks")
def test_a_graph_can_be_walked_twice():
    """As callbacks do that compare the gradients of two losses."""
    ours = inputs()
    logprobs, entropy = token_statistics(ours, torch.arange(11) % 7)
    first = torch.autograd.grad(logprobs.sum(), ours.weight, retain_graph=True)[0]
    torch.autograd.grad(entropy.sum(), ours.weight, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(logprobs.sum(), ours.weight)[0], first, rtol=0, atol=0)


@pytest.mark.parametrize(("kept", "computed"), [(10**9, 4), (45, 6), (0, 8)])
def test_logits_are_computed_again_only_where_they_were_not_kept(monkeypatch, kept, computed):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 21)
    monkeypatch.setattr(head, "KEPT_ELEMENTS", kept)
    seen = []
    monkeypatch.setattr(head, "float32_linear", lambda s, *a, **k: seen.append(len(s)) or float32_linear(s, *a, **k))
    logprobs, _ = token_statistics(inputs(), torch.arange(11) % 7)
    logprobs.sum().backward()
    assert len(seen) == computed


@pytest.mark.parametrize("with_reference", [False, True])
def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch, with_reference):
    """No tensor is larger than a chunk, the head itself aside; without the limit one of N x V shows up."""
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(
                t.numel() for t in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(t)
            )
            return result

    def run():
        largest.clear()
        tensors = inputs(n=64, hidden=3, vocab=50)
        ref = HeadInputs(*(t.detach() for t in inputs(n=64, hidden=3, vocab=50, seed=1))) if with_reference else None
        with Sizes():
            logprobs, entropy_or_kl = token_statistics(tensors, torch.arange(64) % 50, kl_to=ref)
            (logprobs + entropy_or_kl).sum().backward()
        return max(largest)

    assert run() == 64 * 50
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 400)
    assert run() == 400


def test_an_impossible_token_adds_nothing():
    """Its logit is -inf: probability 0, and no NaN in value or gradient."""
    bias = torch.zeros(7, dtype=torch.float64)
    bias[3] = -torch.inf
    states, weight, _ = inputs()
    ids = torch.zeros(11, dtype=torch.long)
    logprobs, entropy = token_statistics(HeadInputs(states, weight, bias), ids)
    possible = [0, 1, 2, 4, 5, 6]
    plain = Categorical(logits=(states @ weight.T)[:, possible])
    torch.testing.assert_close(entropy, plain.entropy(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logprobs, plain.log_prob(ids), rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad((100 * entropy + logprobs).sum(), states, retain_graph=True)
    (expected,) = torch.autograd.grad((100 * plain.entropy() + plain.log_prob(ids)).sum(), states)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("chunk", [10**9, 3 * 40])
def test_bf16_products_are_accumulated_in_float32(monkeypatch, chunk):
    """Statistics are those of exact sums of bf16 products; gradients are within bf16's rounding of the exact ones."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    exact = inputs(n=33, hidden=16, vocab=40)
    ours = HeadInputs(*(t.detach().float().requires_grad_() for t in exact))
    ids = torch.arange(33) % 40
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = token_statistics(ours, ids)
    assert logprobs.dtype == entropy.dtype == torch.float32
    plain = Categorical(logits=torch.nn.functional.linear(*(x.detach().bfloat16().double() for x in ours)).float())
    torch.testing.assert_close(logprobs, plain.log_prob(ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, plain.entropy(), rtol=1e-5, atol=1e-5)
    (logprobs + entropy).sum().backward()
    sum(x.sum() for x in token_statistics(exact, ids)).backward()
    for a, b in zip(ours, exact, strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 2e-2 * b.grad.norm()  # bf16 keeps 8 bits: 4e-3 a product, and its logits


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("kept", [10**9, 0])
def test_a_backward_inside_of_autocast_gives_the_same_gradients(monkeypatch, kept, with_reference):
    """Lightning runs it there; logits that it computes again are not rounded either."""
    monkeypatch.setattr(head, "KEPT_ELEMENTS", kept)
    reference = HeadInputs(*(t.detach().float() for t in inputs(n=33, hidden=16, vocab=40, seed=1)))
    gradients = []
    for inside in (True, False):
        ours = HeadInputs(*(t.detach().float().requires_grad_() for t in inputs(n=33, hidden=16, vocab=40)))
        with torch.autocast("cpu", torch.bfloat16):
            found = token_statistics(ours, torch.arange(33) % 40, kl_to=reference if with_reference else None)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            sum(found).sum().backward()
        gradients.append([t.grad for t in ours])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_bf16_logits_of_a_large_vocabulary_are_not_rounded(held):
    """Float64 of the same bf16 numbers; logits rounded to bf16 would be off by 1e-3 and more."""
    g = torch.Generator().manual_seed(0)
    states, weight = torch.randn(20, 64, generator=g), torch.randn(30_000, 64, generator=g)
    ids = torch.arange(20)
    rounded = [x.bfloat16() for x in (states, weight)]
    exact = Categorical(logits=rounded[0].double() @ rounded[1].double().T)
    given = rounded if held == "bfloat16" else (states, weight)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=held == "float32"):
        logprobs, entropy = token_statistics(HeadInputs(*given, None), ids)
    torch.testing.assert_close(logprobs.double(), exact.log_prob(ids), rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy.double(), exact.entropy(), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("kind", "free", "vocabulary", "dtype", "tokens"),
    [
        ("cpu", 0, 151_936, torch.float32, 55),  # 2**23 logits
        ("mps", 0, 50_257, torch.float32, 166),
        ("cpu", 0, 2**24, torch.float32, 1),
        ("cuda", 70 * 2**30, 151_936, torch.bfloat16, 883),  # 2**27
        ("cuda", 4 * 2**30, 151_936, torch.bfloat16, 110),  # an eighth, 2**29 bytes, 22 a logit: 2**24
        ("cuda", 4 * 2**30, 151_936, torch.float64, 55),  # 48 a logit: 2**23
        ("cuda", 0, 151_936, torch.float32, 55),  # no less than on a CPU
    ],
)
def test_chunks_are_larger_where_a_gpu_has_room(kind, free, vocabulary, dtype, tokens):
    assert head.chunks_for(kind, free, vocabulary, dtype).tokens == tokens


def test_no_tokens_give_gradients_of_zero():
    """As a micro-batch whose responses are all empty does: every rank must still have a gradient to average."""
    ours = inputs(n=0)
    logprobs, entropy = token_statistics(ours, torch.zeros(0, dtype=torch.long))
    (logprobs.sum() + entropy.sum()).backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in ours)
