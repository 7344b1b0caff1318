"""The head of SFT against a plain one in float64."""

from types import SimpleNamespace

import pytest
import torch

from lit_ppo.generation.transformers import float32_logits
from lit_ppo.supervised.head import use_float32_logits


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_logits_of_a_causal_lm_are_sums_in_float32(held):
    """As of SFT: float64 of the same bf16 numbers, and gradients within bf16's rounding; float32 stays to the bit."""
    g = torch.Generator().manual_seed(0)
    lm = SimpleNamespace(linear=torch.nn.Linear(64, 5000))
    lm.get_output_embeddings = lambda: lm.linear
    states = torch.randn(2, 9, 64, generator=g)
    expected = lm.linear(states)
    use_float32_logits(lm)
    assert lm.linear(states).equal(expected)
    lm.linear.to(getattr(torch, held))
    exact = torch.nn.functional.linear(*(x.detach().bfloat16().double() for x in (states, *lm.linear.parameters())))
    rows = states.to(getattr(torch, held)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=held == "float32"):
        logits = lm.linear(rows)
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-5)
    weights = torch.randn(logits.shape, generator=g)
    ours = torch.autograd.grad((logits * weights).sum(), [rows, *lm.linear.parameters()])
    plain = [rows.detach().double(), *(p.detach().double() for p in lm.linear.parameters())]
    for x in plain:
        x.requires_grad_()
    theirs = torch.autograd.grad((torch.nn.functional.linear(*plain) * weights).sum(), plain)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm()


def test_sampling_leaves_the_head_of_training_as_it_was():
    """Both let the head sum in float32; the first one has to outlast the second."""
    lm = SimpleNamespace(linear=torch.nn.Linear(64, 50))
    lm.get_output_embeddings = lambda: lm.linear
    use_float32_logits(lm)
    with torch.autocast("cpu", torch.bfloat16):
        with float32_logits(lm, "cpu"):
            sampled = lm.linear(torch.ones(1, 64))
        assert sampled.dtype == lm.linear(torch.ones(1, 64)).dtype == torch.float32
