"""Samplers that do all their work but return scripted tokens, so that both sides learn from the same ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import LogitsProcessor

from benchmarks.jobs import KEY


class Script:
    """What to sample after each prompt.

    Args:
        prompts: Token ids.
        responses: Token ids, all of one length.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
        self.row_of = {tuple(prompt[-KEY:]): row for row, prompt in enumerate(prompts)}
        self.responses = torch.tensor(responses)

    def rows(self, input_ids: Tensor) -> Tensor:
        """Numbers of the prompts, identified by their last tokens (padding is on the left).

        Shapes:
            (B, P) -> (B,).
        """
        return torch.tensor([self.row_of[tuple(key)] for key in input_ids[:, -KEY:].tolist()], device=input_ids.device)


class Scripted(LogitsProcessor):
    """Leaves only the scripted token. Make a new one for each call of ``generate``.

    A sampler that drops ended rows also drops them from ``rows``, the only tensor here.
    """

    def __init__(self, script: Script) -> None:
        self.script, self.step = script, 0
        self.rows: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with all but one token at minus infinity."""
        if self.rows is None:
            self.rows = self.script.rows(input_ids)
        tokens = self.script.responses.to(scores.device)[self.rows, self.step].unsqueeze(1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, scores.gather(1, tokens))


@contextmanager
def scripted_multinomial(script: Script, input_ids: Tensor) -> Iterator[None]:
    """Make ``torch.multinomial`` return the scripted tokens of one ``generate``, after it has drawn.

    This is for a trainer that computes log-probs from the scores after the processors: with :class:`Scripted` they
    would all be 0.
    """
    rows, draw, step = script.rows(input_ids), torch.multinomial, 0

    def multinomial(probs: Tensor, num_samples: int) -> Tensor:
        nonlocal step
        draw(probs, num_samples)
        step += 1
        return script.responses.to(probs.device)[rows, step - 1].unsqueeze(1)

    torch.multinomial = multinomial
    try:
        yield
    finally:
        torch.multinomial = draw
