"""Experiences and micro-batches made by hand."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lit_ppo.experience import Experience


def make_experience(lengths=(3, 1, 4, 2, 4), prompts=(2, 3, 1, 3, 2)) -> Experience:
    """Rows of these response and prompt lengths, all numbers different."""
    n, longest = len(lengths), max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    prompt_mask = torch.arange(max(prompts)) >= max(prompts) - torch.tensor(prompts)[:, None]
    experience = Experience(
        prompts=[f"p{i}" for i in range(n)],
        responses=[f"r{i}" for i in range(n)],
        columns={"level": list(range(n))},
        prompt_index=torch.arange(n) * 10,
        group=torch.arange(n),
        prompt_ids=torch.arange(n * max(prompts)).reshape(n, -1),
        prompt_mask=prompt_mask,
        response_ids=torch.arange(n * longest).reshape(n, -1) + 100,
        response_mask=mask,
        ended=torch.arange(n) % 2 == 0,
    )
    experience.logprobs = torch.where(mask, -torch.rand(n, longest), 0.0)
    return experience


def make_micro_batch(mask: Tensor, **fields: Tensor | None) -> Any:
    """A micro-batch that is all of its optimizer step, by token mean; ``logged`` keeps the means that it logs."""

    def mean(x: Tensor) -> Tensor:
        return x[mask].mean()

    logged: dict[str, float] = {}
    return SimpleNamespace(
        **fields, mean=mean, log=lambda name, x: logged.update({name: mean(x).item()}), logged=logged
    )
