"""Around an engine: new weights before it samples, a share of the prompts for every rank, a server that restarts."""

import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from lit_ppo.engines.base import Engine
from lit_ppo.engines.weights import checkpoint_weights, weights_key
from lit_ppo.generation.config import stop_ids
from lit_ppo.generation.engine import Progress, Seed
from lit_ppo.parallel.ranks import deal, gather_shares, n_ranks, rank
from lit_ppo.shown import message_of

ATTEMPTS = 3  # times that a lost program is waited for in one rollout
Row = tuple[list[int], list[float], bool]  # ids, log-probs, whether a stop token ended it


class EngineSampler:
    """Samples with an engine, the same rows on every rank.

    Args:
        engine: The engine.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._checked = False
        self._key: int | None = None  # of the weights that the engine has

    def sample(
        self,
        model: Any,
        prompt_ids: list[list[int]],
        n: int,
        config: GenerationConfig,
        seeds: Sequence[Seed] | None,
        *,
        sync: bool = True,
        progress: Progress | None = None,
    ) -> list[Row]:
        """Sample ``n`` responses to each prompt; every rank must be given the same prompts.

        Args:
            model: The actor's Hugging Face model.
            prompt_ids: Token ids of each prompt.
            n: Responses to each.
            config: From :func:`lit_ppo.generation.config.generation_config`.
            seeds: One for each response; None: greedy.
            sync: Bring the weights even if none was changed in place since the last time.
            progress: Told what the engine does.

        Raises:
            RuntimeError: The engine's program was lost and did not come back, or another rank's share failed.
            TypeError, ValueError: The engine returned something else than responses.
        """
        report = progress if progress is not None else _Unseen()
        report.engine = self.engine.name
        self._prepare(model, config)
        try:
            if sync or self.engine.every_rank or any(gather_shares(lambda: self._key != weights_key(model))):
                report.detail = "weights"
                self.sync(model)
            rows: dict[int, list[Row]] = {}
            for attempt in range(ATTEMPTS):
                missing = [i for i in range(len(prompt_ids)) if i not in rows]
                report.detail = f"{len(missing) * n} responses"
                lost = self._ask(prompt_ids, missing, n, config, seeds, rows)
                if lost is None:
                    return [row for i in range(len(prompt_ids)) for row in rows[i]]
                report.detail = "waiting for the engine"
                if attempt + 1 < ATTEMPTS:
                    self.sync(model)
            raise RuntimeError(f"{lost}; lost {ATTEMPTS} times in one rollout")
        finally:
            self._call("sleep")

    def sync(self, model: Any) -> None:
        """Bring the weights to the engine. Collective.

        Raises:
            RuntimeError: The engine's program was lost and did not come back.
        """
        lost = None
        for _ in range(ATTEMPTS):
            answers = gather_shares(lambda: self._send(model))
            lost = next((answer for answer in answers if answer is not None), None)
            if lost is None:
                self._key = weights_key(model)
                return
        raise RuntimeError(f"{lost}; lost {ATTEMPTS} times while weights were sent")

    def forget_weights(self) -> None:
        """Bring the weights again before the next rollout: an optimizer has changed them."""
        self._key = None

    def _prepare(self, model: Any, config: GenerationConfig) -> None:
        if not self._checked:
            gather_shares(lambda: self.engine.check(model, config))
            self._checked = True
        self._call("wake")

    def _call(self, verb: str) -> None:
        if self.engine.every_rank or rank() == 0:
            getattr(self.engine, verb)()

    def _send(self, model: Any) -> str | None:
        """Why the engine was lost, or None."""
        weights = checkpoint_weights(model)
        try:
            if self.engine.every_rank or rank() == 0:
                self.engine.sync(weights)
        except ConnectionError as error:
            return message_of(error, 2000)
        finally:
            _drain(weights)  # gathering a sharded weight takes all ranks
        return None

    def _ask(
        self,
        prompt_ids: list[list[int]],
        missing: list[int],
        n: int,
        config: GenerationConfig,
        seeds: Sequence[Seed] | None,
        rows: dict[int, list[Row]],
    ) -> str | None:
        """Add what the engine samples to ``rows``; returns why the engine was lost, or None."""
        copies = max(n_ranks() // self.engine.ranks_per_copy, 1)
        lengths = [len(prompt_ids[i]) for i in missing]
        mine = [missing[i] for i in deal(lengths, copies)[rank() // self.engine.ranks_per_copy % copies][0]]
        numbers = None if seeds is None else [number_of(seeds[i * n + k]) for i in mine for k in range(n)]

        def share() -> tuple[list[list[int]], dict[int, list[Row]], str | None]:
            if not mine:
                return prompt_ids, {}, None
            try:
                answer = self.engine.generate([prompt_ids[i] for i in mine], n, config, numbers)
            except ConnectionError as error:
                return prompt_ids, {}, message_of(error, 2000)
            sampled = checked_rows(self.engine, answer, len(mine) * n, config)
            return prompt_ids, {i: sampled[k * n : (k + 1) * n] for k, i in enumerate(mine)}, None

        shares = gather_shares(share)
        if any(prompts != prompt_ids for prompts, _, _ in shares):
            raise ValueError(
                "rollout(prompts): ranks were given different prompts, and every rank needs the whole batch; use "
                "PromptDataModule, or Trainer(use_distributed_sampler=False)"
            )
        for _, some, _ in shares:
            rows |= some
        return next((lost for _, _, lost in shares if lost is not None), None)


class _Unseen:
    detail = engine = ""


def _drain(weights: Iterator[tuple[str, Tensor]]) -> None:
    for _ in weights:
        pass


def number_of(seed: Seed) -> int:
    """A seed as one number below 2^63."""
    return int.from_bytes(blake2b(repr(tuple(seed)).encode(), digest_size=8).digest(), "big") >> 1


def checked_rows(engine: Engine, answer: Any, count: int, config: GenerationConfig) -> list[Row]:
    """What an engine returned, cut behind the first stop token.

    Raises:
        TypeError: It is not a pair of lists.
        ValueError: A response or a log-prob is missing, or not finite.
    """
    where, stops = f"{type(engine).__name__}.generate", set(stop_ids(config))
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise TypeError(f"{where}: returned a {type(answer).__name__}; return (ids, logprobs), a list a response each")
    ids, logprobs = answer
    if len(ids) != count or len(logprobs) != count:
        raise ValueError(
            f"{where}: returned {len(ids)} responses and log-probs of {len(logprobs)}; {count} responses were asked "
            "for, one a seed"
        )
    rows: list[Row] = []
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
        rows.append((row[:end], numbers[:end], row[end - 1] in stops))
    return rows
