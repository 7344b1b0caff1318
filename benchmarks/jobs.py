"""The jobs that are timed: shapes, prompts, and the tokens that both sides sample."""

from dataclasses import dataclass, replace

import numpy as np

PAD, EOS, UNK, FIRST_WORD = 0, 1, 2, 3
KEY = 4  # last tokens of a prompt, which identify it for the sampler


@dataclass(frozen=True)
class Job:
    """One update of four GPT-2 models of the same size with random weights.

    Args:
        name: What it is called.
        hidden: Width.
        layers: Blocks.
        heads: Attention heads.
        vocabulary: Tokens.
        prompts: Prompts per update, with one response each.
        longest_prompt: Tokens; lengths are uniform from half of it.
        longest_response: Tokens.
        mean_response: Mean of the geometric distribution of lengths, before it is cut at the longest; None: every
            response has the longest length.
        epochs: Passes over the experience.
        minibatches: Optimizer steps per pass.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    vocabulary: int
    prompts: int
    longest_prompt: int
    longest_response: int
    mean_response: float | None
    epochs: int = 4
    minibatches: int = 4

    @property
    def minibatch_size(self) -> int:
        """Responses in an optimizer step."""
        return self.prompts // self.minibatches

    def full(self) -> "Job":
        """The same job with every response at the longest length, without a stop token."""
        return replace(self, mean_response=None)


JOBS = {
    job.name: job
    for job in (
        Job("tiny", 16, 2, 2, 100, 8, 8, 8, 4),
        Job("narrow", 128, 2, 4, 32_000, 8, 32, 64, 26),  # what scaling.py varies: quick enough for long responses
        Job("small", 256, 4, 4, 32_000, 32, 32, 64, 26),
        Job("small-full", 256, 4, 4, 32_000, 32, 32, 64, None),
        Job("medium", 512, 6, 8, 32_000, 32, 48, 96, 38),
        Job("large", 512, 8, 8, 50_257, 64, 64, 128, 51),
    )
}


def prompt_lengths(job: Job, rng: np.random.Generator) -> list[int]:
    """Lengths spread evenly from half the longest to the longest, in random order."""
    return rng.permutation(np.linspace(job.longest_prompt // 2, job.longest_prompt, job.prompts).round()).astype(int)


def response_lengths(job: Job, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each response, its stop token included, and whether it has one.

    These are quantiles of the geometric distribution, not draws, so that a few responses have its mean too.

    Shapes:
        -> (B,) integers, (B,) booleans.
    """
    if job.mean_response is None:
        return np.full(job.prompts, job.longest_response), np.zeros(job.prompts, dtype=bool)
    shares = (np.arange(job.prompts) + 0.5) / job.prompts
    lengths = np.ceil(np.log1p(-shares) / np.log1p(-1 / job.mean_response)).astype(int)
    lengths = rng.permutation(np.maximum(lengths, 1))
    return np.minimum(lengths, job.longest_response), lengths <= job.longest_response


def script(job: Job, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and the tokens to sample after each.

    Every response has the longest length, with words after its stop token, for a trainer that keeps sampling.

    Returns:
        Token ids of the prompts, of different lengths, and of the responses, all of the longest length.
    """
    rng = np.random.default_rng(seed)
    prompts: list[list[int]] = []
    keys: set[tuple[int, ...]] = set()
    for length in prompt_lengths(job, rng):
        prompt = rng.integers(FIRST_WORD, job.vocabulary, length).tolist()
        while tuple(prompt[-KEY:]) in keys:
            prompt = rng.integers(FIRST_WORD, job.vocabulary, length).tolist()
        keys.add(tuple(prompt[-KEY:]))
        prompts.append(prompt)
    responses = rng.integers(FIRST_WORD, job.vocabulary, (job.prompts, job.longest_response))
    for row, (length, ended) in enumerate(zip(*response_lengths(job, rng), strict=True)):
        if ended:
            responses[row, length - 1] = EOS
    return prompts, responses.tolist()


def response_length(response: list[int]) -> int:
    """Number of tokens up to the first stop token, which counts."""
    return response.index(EOS) + 1 if EOS in response else len(response)
