"""Prompts to scored responses: the same experience on every rank, each rank doing its share of the work."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from lit_ppo.advantages import check_estimator
from lit_ppo.callbacks.base import fire
from lit_ppo.constructor import constructor
from lit_ppo.data.batch import PromptBatch
from lit_ppo.engines.base import Engine, Sampled
from lit_ppo.engines.next_rollout import start_ahead
from lit_ppo.engines.sampler import EngineSampler
from lit_ppo.experience import Experience
from lit_ppo.generation.engine import Limits, Progress, Sampling, Seed
from lit_ppo.generation.transformers import continuations, row_seeds
from lit_ppo.models.lora import WithoutAdapter
from lit_ppo.models.positions import UNBOUNDED, check_length, row_groups
from lit_ppo.parallel.ranks import deal, gather_shares, map_rows, my_rows
from lit_ppo.parallel.sharding import gathered
from lit_ppo.ppo.prompts import checked_batch
from lit_ppo.ppo.settings import Models
from lit_ppo.rewards.function import name_of, scores_of, source_names
from lit_ppo.rewards.time_limit import within
from lit_ppo.shown import message_of
from lit_ppo.validate import refuse

Policy = Literal["actor", "reference"]
Row = tuple[Sequence[int], Sequence[float] | None]  # ids of a response, and their log-probs in sampling


def rollout_with_hooks(module: Any, prompts: Any, rollout: Callable[[Any], Experience]) -> Experience:
    """The rollout of an update; calls the hooks before and after it.

    Args:
        module: The LitPPO.
        prompts: What ``rollout`` takes.
        rollout: Samples, silently.
    """
    module.progress.start("rollout")
    if module.rollouts == 0 or not isinstance(prompts, PromptBatch):
        prompts = checked_batch(module, prompts)
    fire(module, "on_rollout_start", prompts)
    check_estimator(module, module.advantages, module.samples_per_prompt, module.kl_coef)
    experience = rollout(prompts)
    fire(module, "on_rollout_end", experience)
    if module.rollout_ahead:
        start_ahead(module)
    module.progress.start("score")
    return experience


class TransformersEngine(Engine):
    """The default: the actor samples, by LitPPO's own decode loop. Nothing to install, and exactly reproducible.

    Its samples depend on (seed, update, row, sample) alone, and there are no weights to bring anywhere. The reference,
    too, samples by it, whatever engine samples in place of the actor.
    """

    name = "transformers"
    own_weights = False

    @constructor
    def __init__(self) -> None:
        self.engine: Engine = self  # as an EngineSampler has one
        self._how: Sampling | None = None  # in a rollout

    @contextmanager
    def ready(self, how: Sampling) -> Iterator[None]:
        """Inside the context :meth:`generate` samples with the policy; a sharded one is gathered. Collective."""
        module = how.policy.actor if isinstance(how.policy, WithoutAdapter) else how.policy
        self._how = how
        try:
            with gathered(module) if module.sharded else nullcontext():
                yield
        finally:
            self._how = None

    def generate(
        self, prompt_ids: list[list[int]], n: int, config: GenerationConfig, seeds: Sequence[Seed | int] | None
    ) -> Sampled:
        if self._how is None:
            raise RuntimeError("TransformersEngine.generate: samples with a model that LitPPO.rollout gives; call that")
        how, rows = self._how, [ids for ids in prompt_ids for _ in range(n)]
        sampled: dict[int, tuple[list[int], list[float]]] = {}
        for some in _groups(how, [len(ids) for ids in rows]):
            ids, mask = _pad_ids([rows[row] for row in some], left=True, device=how.device)
            responses = how.policy.generate(
                ids, mask, config, None if seeds is None else [seeds[row] for row in some], logprobs=how.logprobs,
                progress=how.progress,
            )  # fmt: skip
            sampled |= zip(some, zip(responses.ids, responses.logprobs, strict=True), strict=True)
        ordered = [sampled[row] for row in range(len(rows))]
        return [ids for ids, _ in ordered], [logprobs for _, logprobs in ordered] if how.logprobs else None

    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Nothing: the actor's weights are those that sample."""


def _groups(how: Sampling, lengths: list[int]) -> list[list[int]]:
    """Rows that are sampled together."""
    groups = [list(range(len(lengths)))]
    if how.policy.model not in UNBOUNDED:
        groups = row_groups(how.policy.model, lengths, is_gathered=True)
    if any(how.limits.values()):
        longest = [length + int(how.config.max_new_tokens) for length in lengths]
        plans = [(group, deal([longest[row] for row in group], 1, **how.limits)[0]) for group in groups]
        groups = [[group[i] for i in part] for group, parts in plans for part in parts]
    return groups


def sample_responses(
    models: Models,
    batch: PromptBatch,
    samples_per_prompt: int,
    stream: tuple[int, str, int] | None,
    *,
    engine: TransformersEngine | EngineSampler,
    policy: Policy = "actor",
    sampling_logprobs: bool = False,
    limits: Limits,
    progress: Progress | None = None,
    device: torch.device,
    skip_special_tokens: bool = True,
) -> tuple[Experience, Tensor | None]:
    """Sample ``samples_per_prompt`` responses to each prompt; every rank must be given the same prompts.

    Args:
        models: The policy, its tokenizer and its generation settings.
        batch: Prompts of all ranks.
        samples_per_prompt: Responses to each.
        stream: Seed, name of the random stream and number of the update; None: greedy.
        engine: Samples for this policy. Log-probs of its own become ``sampling_logprobs``.
        policy: Which model samples.
        sampling_logprobs: Also return the log-probs of the decode loop.
        limits: Of what one rank samples at once, in rows or in tokens with ``max_new_tokens`` for each response.
        progress: For the progress bar.
        device: Of the experience.
        skip_special_tokens: Leave them out of the text of responses.

    Returns:
        The experience, and the log-probs (B, T) of the decode loop if they were asked for.

    Raises:
        ValueError: A prompt is too long, there is no reference to sample from, or ranks were given different prompts.
        RuntimeError: The engine's program was lost and did not come back, or another rank's share failed.
    """
    if not batch.prompts:
        raise ValueError("rollout(prompts=[]): is empty; give at least one prompt")
    if max(map(len, batch.prompt_ids)) > models.safe_length:
        check_length(models, [len(ids) for ids in batch.prompt_ids])
    model = models.actor if policy == "actor" else models.reference
    if model is None:
        raise ValueError("rollout(policy='reference'): there is no reference; give LitPPO one")
    row_prompts = [prompt for prompt in range(len(batch.prompts)) for _ in range(samples_per_prompt)]
    seeds = None if stream is None else row_seeds(stream, len(batch.prompts), samples_per_prompt)
    row_ids = [batch.prompt_ids[prompt] for prompt in row_prompts]
    how = Sampling(
        policy=model, config=models.generation, logprobs=sampling_logprobs, limits=limits, device=device,
        progress=progress, trains=stream is not None and stream[1] == "train",
    )  # fmt: skip
    sampled = _sample_rows(engine, how, row_ids, seeds)
    ids, logprobs = zip(*sampled, strict=True)
    stops = models.generation.eos_token_id
    ended = [row[-1] in (stops if isinstance(stops, list | tuple) else [stops]) for row in ids]
    prompt_ids, prompt_mask = _pad_ids(row_ids, left=True, device=device)
    response_ids, response_mask = _pad_ids(ids, left=False, device=device)
    # where special tokens are shown, the one that ended the response is not
    shown = ids if skip_special_tokens else tuple(row[: len(row) - end] for row, end in zip(ids, ended, strict=True))
    group = torch.tensor(row_prompts, device=device)
    experience = Experience(
        prompts=[batch.prompts[prompt] for prompt in row_prompts],
        responses=continuations(models.tokenizer, row_ids, shown, skip_special_tokens),
        columns={name: [values[prompt] for prompt in row_prompts] for name, values in batch.columns.items()},
        prompt_index=batch.prompt_index.to(device)[group],
        group=group,
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        ended=torch.tensor(ended, device=device),
    )
    if logprobs[0] is None:
        return experience, None
    padded = pad_sequence([torch.tensor(row) for row in logprobs], batch_first=True).to(device)
    if sampling_logprobs:
        return experience, padded
    experience.sampling_logprobs = None if seeds is None else padded  # greedy: of no distribution
    return experience, None


def _sample_rows(
    engine: TransformersEngine | EngineSampler, how: Sampling, row_ids: list[list[int]], seeds: list[Seed] | None
) -> list[Row]:
    """Responses of all rows and their log-probs, each rank asking the engine for its share.

    Args:
        engine: Samples.
        how: The policy and the settings.
        row_ids: The prompt of each row; all ranks must have the same.
        seeds: Of each row; None: greedy.
    """

    def ask(mine: list[int]) -> tuple[list[list[int]], dict[int, Row], str | None]:
        """The prompts that this rank was given, its responses, and why the engine was lost, if it was."""
        if not mine:
            return row_ids, {}, None
        try:
            ids, logprobs = engine.generate(
                [row_ids[row] for row in mine], 1, how.config, None if seeds is None else [seeds[row] for row in mine]
            )
        except ConnectionError as error:
            if not engine.own_weights:
                raise
            return row_ids, {}, message_of(error, 2000)
        found = zip(ids, [None] * len(ids) if logprobs is None else logprobs, strict=True)
        return row_ids, dict(zip(mine, found, strict=True)), None

    rows: dict[int, Row] = {}
    with engine.ready(how):
        while missing := [row for row in range(len(row_ids)) if row not in rows]:
            if how.progress is not None:
                how.progress.detail = f"{len(missing)} responses"
            mine = [missing[i] for i in my_rows([len(row_ids[row]) for row in missing], engine.ranks_per_copy)]
            shares = gather_shares(partial(ask, mine))
            if any(prompts != row_ids for prompts, _, _ in shares):
                raise ValueError(
                    "rollout(prompts): ranks were given different prompts, and every rank needs the whole batch; use "
                    "PromptDataModule, or Trainer(use_distributed_sampler=False)"
                )
            for _, some, _ in shares:
                rows |= some
            if lost := [problem for _, _, problem in shares if problem is not None]:
                engine.recover(lost[0])  # type: ignore[union-attr]
    return [rows[row] for row in range(len(row_ids))]


@torch.inference_mode(False)
@torch.no_grad()
def score_experience(module: Any, experience: Experience) -> Tensor:
    """Scores of the responses, (B,) float32; those of several rewards are also in ``extras`` by name."""
    if module.loop and module.loop.waiting:
        scored: Tensor = module.loop.score(score_experience, experience)
        return scored
    if module.rewards is None:
        refuse(module, "rewards", None, "there is nothing to score with; give rewards, or set experience.scores")
    if not module._built:
        module.configure_model()
    scores = score(module.rewards, experience, timeout=module.reward_timeout)
    experience.extras |= {name: values for name, values in scores.items() if name}
    return scores[""]


def score(source: Any, experience: Experience, *, timeout: float | None = None) -> dict[str, Tensor]:
    """Scores by a source, (B,) float32, under the name ``""``; those of its parts, if it has any, under their names.

    Args:
        source: See :func:`lit_ppo.rewards.as_source`.
        experience: Responses of all ranks.
        timeout: Seconds that this rank's share may take.
    """

    def score_rows(rows: list[int]) -> dict[str, Tensor]:
        if not rows:
            return {}
        mine = experience.select(rows)
        limit = f"{name_of(source)}, {len(rows)} responses (reward_timeout)"
        scores = scores_of(source, mine) if timeout is None else within(timeout, limit, lambda: scores_of(source, mine))
        return {"": scores.cpu(), **{name: mine.extras[name].cpu() for name in source_names(source)}}

    with gathered(source) if isinstance(source, nn.Module) else nullcontext():
        shares = map_rows([1] * len(experience.responses), score_rows)
    device = experience.response_ids.device
    gathered_scores: dict[str, Tensor] = {}
    for rows, named in shares:
        for name, values in named.items():
            empty = torch.empty(len(experience.responses), dtype=torch.float32, device=device)
            gathered_scores.setdefault(name, empty)[rows] = values.to(device)
    return gathered_scores


def _pad_ids(rows: Sequence[Sequence[int]], *, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids padded with 0, and the mask that tells tokens from padding, (B, L) each."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ones = [torch.ones_like(row, dtype=torch.bool) for row in tensors]
    side = "left" if left else "right"
    ids = pad_sequence(tensors, batch_first=True, padding_side=side)
    return ids.to(device), pad_sequence(ones, batch_first=True, padding_side=side).to(device)
