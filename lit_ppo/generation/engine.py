"""The interface of models that sample by themselves; other programs are in :mod:`lit_ppo.engines`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig


class Responses(NamedTuple):
    """Sampled responses, one entry per row."""

    ids: list[list[int]]  # each up to and including its first stop token
    logprobs: list[list[float]]  # of the sampled tokens; empty lists where they were not asked for
    ended: list[bool]  # False where max_new_tokens cut the response


Seed = tuple[int, ...]
"""Names the random numbers of one row: the run's seed, stream, update, prompt and sample number."""


class Progress(Protocol):
    """Where an engine reports how far it is, for the progress bar."""

    detail: str
    engine: str  # that samples in place of the actor; empty: the actor does


class Decoder(Protocol):
    """A model that samples responses to a batch of prompts on one rank.

    The actor is one, and so is the reference: they run :func:`lit_ppo.generation.transformers.generate`.
    """

    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        config: GenerationConfig,
        seeds: Sequence[Seed] | None,
        *,
        logprobs: bool = False,
        progress: Progress | None = None,
    ) -> Responses:
        """Sample one response per row.

        Args:
            prompt_ids: Left-padded.
            prompt_mask: True at prompt tokens.
            config: From :func:`lit_ppo.generation.config.generation_config`.
            seeds: One per row; a row's sample depends on nothing else. None: greedy.
            logprobs: Also return the log-probs of the sampled tokens, at the sampling temperature.
            progress: Told how many tokens the longest response has.

        Shapes:
            prompt_ids, prompt_mask (B, P).
        """
        ...


Limits = dict[str, int | None]
"""Of a forward: ``micro_batch_size`` or ``micro_batch_tokens``."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Who samples in one rollout, and how."""

    policy: Any  # the actor or the reference, a Decoder around a Hugging Face ``model``
    config: GenerationConfig  # from lit_ppo.generation.config.generation_config
    logprobs: bool  # also return log-probs, where the policy itself samples
    limits: Limits  # of what one rank samples at once, in rows or in tokens with max_new_tokens for each response
    device: torch.device  # of the policy
    progress: Progress | None  # for the progress bar
    trains: bool  # on the samples, so the weights must be the newest ones
