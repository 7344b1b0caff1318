"""Devices without float64 get the numbers of the CPU."""

from pathlib import Path

import pytest
import torch

from lit_ppo.functional import inverse_cdf, merge_moments
from lit_ppo.parallel.ranks import sum_over_ranks
from tests.helpers.no_float64 import device_without_float64
from tests.helpers.toys import make_module

V = 151_936  # of Qwen 2.5


def test_every_token_of_a_large_vocabulary_can_be_drawn() -> None:
    """Of equal probabilities the draw (k + 1/2) / V is in the middle of token k; float32 skips one in eight."""
    tokens = torch.cat([torch.arange(0, V, 9973), torch.arange(V - 60, V)])
    draws = torch.cat([(tokens.double() + 0.5) / V, torch.tensor([1 - 2.0**-53], dtype=torch.float64)])
    with device_without_float64() as device:
        drawn = inverse_cdf(torch.zeros(len(draws), V).to(device), draws)
        assert drawn.device == device
        assert drawn.tolist() == [*tokens.tolist(), V - 1]


def test_samples_there_are_those_of_the_cpu(lm: Path) -> None:
    options = {"generation": {"max_new_tokens": 6}, "model_kwargs": {"attn_implementation": "eager"}}
    module = make_module(lm, **options)
    expected = module.rollout(["the film was", "a"], samples_per_prompt=3, logprobs=False)
    with device_without_float64() as device:
        there = make_module(lm, **options).to(device)
        found = there.rollout(["the film was", "a"], samples_per_prompt=3, logprobs=False)
        assert found.response_ids.device == device
        assert found.response_ids.tolist() == expected.response_ids.tolist()


def test_moments_and_sums_there_are_those_of_the_cpu() -> None:
    values = torch.tensor([5.0, 8.0])
    with device_without_float64() as device:
        assert merge_moments(2, 2.0, 2.0, values.to(device)) == pytest.approx(merge_moments(2, 2.0, 2.0, values))
        assert sum_over_ranks({"a": values.to(device).sum()}) == {"a": 13.0}


def test_a_token_of_probability_0_is_never_drawn() -> None:
    """At both ends, where the draw is 0 or just below 1 and the sum of probabilities is rounded, and in between."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 64, generator=g)
    logits[torch.rand(400, 64, generator=g) < 0.5] = -torch.inf
    logits[:, [0, -1]], logits[:, 5] = -torch.inf, 0.0
    for draw in (0.0, 2.0**-53, 0.5, 1 - 2.0**-53):
        drawn = inverse_cdf(logits, torch.full((400,), draw, dtype=torch.float64))
        assert logits.gather(1, drawn.unsqueeze(1)).isfinite().all()
