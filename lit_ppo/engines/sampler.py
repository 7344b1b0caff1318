"""Around an engine: new weights before it samples, answers that are checked, a program that restarts."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import groupby
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from lit_ppo.engines.ahead import Ahead, Answers
from lit_ppo.engines.base import Engine
from lit_ppo.engines.weights import adapter_weights, checkpoint_weights, weights_key
from lit_ppo.generation.config import stop_ids
from lit_ppo.generation.engine import Sampling, Seed
from lit_ppo.parallel.ranks import gather_shares, my_rows, rank
from lit_ppo.shown import message_of

ATTEMPTS = 3  # times that a lost program is waited for in one rollout


class EngineSampler:
    """An engine with weights of its own, which are those of the actor whenever it samples.

    Args:
        engine: The engine.
    """

    own_weights = True

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.ahead = Ahead()
        self.is_stale = True  # whether an optimizer has changed the actor since the weights were sent
        self._checked = False
        self._key: int | None = None  # of the weights that the engine has
        self._model: Any = None
        self._losses = 0  # in this rollout

    @property
    def ranks_per_copy(self) -> int:
        """Ranks that get the same prompts."""
        return self.engine.ranks_per_copy

    @contextmanager
    def ready(self, how: Sampling) -> Iterator[None]:
        """Inside the context the engine is awake and has the weights. Collective.

        Raises:
            RuntimeError: The engine's program was lost and did not come back.
        """
        if how.progress is not None:
            how.progress.engine, how.progress.detail = self.engine.name, "waiting for the engine"
        self._wait_ahead()
        self._model, self._losses = how.policy.model, 0
        if not self._checked:
            gather_shares(lambda: self.engine.check(self._model, how.config))
            self._checked = True
        if how.progress is not None:
            how.progress.detail = "weights"
        self._call("wake")
        try:
            if how.trains or self.engine.every_rank or any(gather_shares(self._has_old_weights)):
                self.sync()
            yield
        finally:
            self._call("sleep")
            self._model = None

    def generate(
        self, prompt_ids: list[list[int]], n: int, config: GenerationConfig, seeds: Sequence[Seed] | None
    ) -> Answers:
        """What the engine samples for this rank's share, checked; see :meth:`lit_ppo.engines.base.Engine.generate`."""
        rows = [ids for ids in prompt_ids for _ in range(n)]
        if seeds is not None and (known := self.ahead.take(rows, seeds)) is not None:
            return known
        return self._sampled(rows, config, seeds)

    def _sampled(self, rows: list[list[int]], config: GenerationConfig, seeds: Sequence[Seed] | None) -> Answers:
        prompts, each = grouped(rows)
        numbers = None if seeds is None else [number_of(seed) for seed in seeds]
        return checked(self.engine, self.engine.generate(prompts, each, config, numbers), len(prompts) * each, config)

    def start_ahead(self, row_ids: list[list[int]], config: GenerationConfig, seeds: list[Seed]) -> None:
        """Sample in a thread what the next rollout will ask for, with the weights that the engine has.

        Args:
            row_ids: The prompt of each row of all ranks.
            config: As for :meth:`generate`.
            seeds: Of each row.
        """
        self._wait_ahead()
        mine = my_rows([len(ids) for ids in row_ids], self.ranks_per_copy)
        my_prompts, my_seeds = [row_ids[row] for row in mine], [seeds[row] for row in mine]
        self._call("wake")
        self.ahead.start(
            my_prompts, my_seeds, lambda: self._sampled(my_prompts, config, my_seeds) if mine else ([], [])
        )

    def ahead_state(self) -> list[Any]:
        """The responses that are sampled ahead, of all ranks, once they are complete. Collective."""
        self._wait_ahead()
        return [row for rows in gather_shares(self.ahead.state) for row in rows]

    def _wait_ahead(self) -> None:
        if self.ahead.is_running:
            gather_shares(self.ahead.wait)  # weights that one rank sends would change what another one is sampling
            self._call("sleep")

    def recover(self, lost: str) -> None:
        """Bring the weights again, to ask for what is missing. Collective.

        Args:
            lost: Why the engine's program was lost.

        Raises:
            RuntimeError: It was lost too often, or did not come back.
        """
        self._losses += 1
        if self._losses == ATTEMPTS:
            raise RuntimeError(f"{lost}; lost {ATTEMPTS} times in one rollout")
        self.sync()

    def sync(self) -> None:
        """Bring the weights to the engine. Collective.

        Raises:
            RuntimeError: The engine's program was lost and did not come back.
        """
        lost = None
        for _ in range(ATTEMPTS):
            lost = next((answer for answer in gather_shares(self._send) if answer is not None), None)
            if lost is None:
                self._key, self.is_stale = weights_key(self._model), False
                return
        raise RuntimeError(f"{lost}; lost {ATTEMPTS} times while weights were sent")

    def _has_old_weights(self) -> bool:
        return self.is_stale or self._key != weights_key(self._model)

    def _call(self, verb: str) -> None:
        if self.engine.every_rank or rank() == 0:
            getattr(self.engine, verb)()

    def _send(self) -> str | None:
        """Why the engine was lost, or None."""
        weights = adapter_weights(self._model) if self.engine.adapter else checkpoint_weights(self._model)
        try:
            if self.engine.every_rank or rank() == 0:
                self.engine.sync(weights)
        except ConnectionError as error:
            return message_of(error, 2000)
        finally:
            _drain(weights)  # gathering a sharded weight takes all ranks
        return None


def _drain(weights: Iterator[tuple[str, Tensor]]) -> None:
    for _ in weights:
        pass


def grouped(rows: list[list[int]]) -> tuple[list[list[int]], int]:
    """Prompts, and how many neighbouring rows each has; all rows, once each, where the prompts have not equally many.

    >>> grouped([[5], [5], [6], [6]])
    ([[5], [6]], 2)
    """
    groups = [(ids, len(list(same))) for ids, same in groupby(rows)]
    counts = {count for _, count in groups}
    return ([ids for ids, _ in groups], counts.pop()) if len(counts) == 1 else (rows, 1)


def number_of(seed: Seed) -> int:
    """A seed as one number below 2^63."""
    return int.from_bytes(blake2b(repr(tuple(seed)).encode(), digest_size=8).digest(), "big") >> 1


def checked(engine: Engine, answer: Any, count: int, config: GenerationConfig) -> Answers:
    """What an engine returned, cut behind the first stop token.

    Raises:
        TypeError: It is not a pair of lists.
        ValueError: A response or a log-prob is missing, or not finite.
    """
    where, stops = f"{type(engine).__name__}.generate", set(stop_ids(config))
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise TypeError(f"{where}: returned a {type(answer).__name__}; return (ids, logprobs), a list a response each")
    ids, logprobs = answer
    if logprobs is None or len(ids) != count or len(logprobs) != count:
        given = "no log-probs" if logprobs is None else f"log-probs of {len(logprobs)}"
        raise ValueError(
            f"{where}: returned {len(ids)} responses and {given}; {count} responses were asked for, one a seed"
        )
    rows: list[tuple[list[int], list[float]]] = []
    for tokens, values in zip(ids, logprobs, strict=True):
        row, numbers = [int(token) for token in tokens], [float(value) for value in values]
        if not row or len(row) != len(numbers) or len(row) > config.max_new_tokens:
            raise ValueError(
                f"{where}: a response has {len(row)} tokens and {len(numbers)} log-probs; give 1 to max_new_tokens="
                f"{config.max_new_tokens} tokens, with the stop token that ended it, and a log-prob for each"
            )
        if not all(math.isfinite(value) for value in numbers):
            raise ValueError(f"{where}: a log-prob is not finite; give those of the tokens that were sampled")
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        rows.append((row[:end], numbers[:end]))
    return [row for row, _ in rows], [numbers for _, numbers in rows]
