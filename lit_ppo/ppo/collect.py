"""Prompts to scored responses: the same experience on every rank, each rank doing its share of the work."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lit_ppo.advantages import check_estimator
from lit_ppo.callbacks.base import fire
from lit_ppo.data.batch import PromptBatch
from lit_ppo.engines.sampler import EngineSampler
from lit_ppo.experience import Experience, ModelInputs
from lit_ppo.functional import KLEstimator, kl_estimate
from lit_ppo.generation.engine import Decoder, Progress, Responses
from lit_ppo.generation.transformers import continuations, row_seeds
from lit_ppo.models.actor_critic import actor_forward, critic_forward
from lit_ppo.models.lora import WithoutAdapter
from lit_ppo.models.positions import UNBOUNDED, check_length, row_groups
from lit_ppo.parallel.ranks import deal, map_forwards, map_rows, n_ranks
from lit_ppo.parallel.sharding import gathered
from lit_ppo.ppo.prompts import checked_batch
from lit_ppo.ppo.settings import Models
from lit_ppo.rewards.function import name_of, scores_of, source_names
from lit_ppo.rewards.time_limit import within
from lit_ppo.validate import refuse

Policy = Literal["actor", "reference"]
Limits = dict[str, int | None]  # micro_batch_size, micro_batch_tokens


def rollout_with_hooks(module: Any, prompts: Any, rollout: Callable[[Any], Experience]) -> Experience:
    """The rollout of an update; calls the hooks before and after it.

    Args:
        module: The LitPPO.
        prompts: What ``rollout`` takes.
        rollout: Samples, silently.

    Raises:
        ValueError: The callbacks have removed all rows.
    """
    module.progress.start("rollout")
    if module.rollouts == 0 or not isinstance(prompts, PromptBatch):
        prompts = checked_batch(module, prompts)
    fire(module, "on_rollout_start", prompts)
    check_estimator(module, module.advantages, module.samples_per_prompt, module.kl_coef)
    experience = rollout(prompts)
    fire(module, "on_rollout_end", experience)
    if not experience.responses:
        raise ValueError("collect: callbacks removed all rows; on_rollout_end must leave at least one")
    module.progress.start("score")
    return experience


def sample_responses(
    models: Models,
    batch: PromptBatch,
    samples_per_prompt: int,
    stream: tuple[int, str, int] | None,
    *,
    policy: Policy = "actor",
    sampling_logprobs: bool = False,
    limits: Limits | None = None,
    progress: Progress | None = None,
    device: torch.device,
    skip_special_tokens: bool = True,
    engine: EngineSampler | None = None,
) -> tuple[Experience, Tensor | None]:
    """Sample ``samples_per_prompt`` responses to each prompt; every rank must be given the same prompts.

    Args:
        models: The policy, its tokenizer and its generation settings.
        batch: Prompts of all ranks.
        samples_per_prompt: Responses to each.
        stream: Seed, name of the random stream and number of the update; None: greedy.
        policy: Which model samples.
        sampling_logprobs: Also return the log-probs of the decode loop.
        limits: Of what one rank samples at once, in rows or in tokens with ``max_new_tokens`` for each response.
        progress: For the progress bar.
        device: Of the experience.
        skip_special_tokens: Leave them out of the text of responses.
        engine: Samples in place of the actor. Its log-probs become ``sampling_logprobs``.

    Returns:
        The experience, and the log-probs (B, T) of the decode loop if they were asked for.

    Raises:
        ValueError: A prompt is too long, there is no reference to sample from, or ranks were given different prompts.
    """
    if not batch.prompts:
        raise ValueError("rollout(prompts=[]): is empty; give at least one prompt")
    if max(map(len, batch.prompt_ids)) > models.safe_length:
        check_length(models, [len(ids) for ids in batch.prompt_ids])
    model = models.actor if policy == "actor" else models.reference
    if model is None:
        raise ValueError("rollout(policy='reference'): there is no reference; give LitPPO one")
    decoder: Decoder = model
    row_prompts = [prompt for prompt in range(len(batch.prompts)) for _ in range(samples_per_prompt)]
    seeds = None if stream is None else row_seeds(stream, len(batch.prompts), samples_per_prompt)
    row_ids = [batch.prompt_ids[prompt] for prompt in row_prompts]
    prompt_ids, prompt_mask = _pad_ids(row_ids, left=True, device=device)

    def generate(rows: list[int], width: int) -> Responses:
        return decoder.generate(
            prompt_ids[rows, -width:], prompt_mask[rows, -width:], models.generation,
            None if seeds is None else [seeds[row] for row in rows], logprobs=sampling_logprobs, progress=progress,
        )  # fmt: skip

    longest = [len(ids) + int(models.generation.max_new_tokens) for ids in row_ids]
    served = engine if policy == "actor" else None
    if served is not None:
        sampled = served.sample(
            model.model, batch.prompt_ids, samples_per_prompt, models.generation, seeds,
            sync=stream is not None and stream[1] == "train", progress=progress,
        )  # fmt: skip
    else:
        sampled = _sample_rows(model, batch.prompt_ids, row_ids, generate, longest, limits or {})
    ids, logprobs, ended = zip(*sampled, strict=True)
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
    if served is None and not sampling_logprobs:
        return experience, None
    padded = pad_sequence([torch.tensor(row) for row in logprobs], batch_first=True).to(device)
    if served is None:
        return experience, padded
    experience.sampling_logprobs = None if stream is None else padded  # greedy: of no distribution
    return experience, None


def _sample_rows(
    model: Any,
    prompt_ids: list[list[int]],
    row_ids: list[list[int]],
    generate: Callable[[list[int], int], Responses],
    longest: list[int],
    limits: Limits,
) -> list[tuple[list[int], list[float], bool]]:
    """Responses of all rows, each rank sampling its share.

    Args:
        model: The policy.
        prompt_ids: This rank's prompts; all ranks must have the same.
        row_ids: The prompt of each row.
        generate: From rows that can share a forward, and their width, to responses.
        longest: Tokens that each row may come to have.
        limits: See :func:`sample_responses`.
    """

    def share(rows: list[int]) -> tuple[list[list[int]], dict[int, tuple[list[int], list[float], bool]]]:
        sampled: dict[int, tuple[list[int], list[float], bool]] = {}
        groups = [list(range(len(rows)))] if rows else []
        if rows and model.model not in UNBOUNDED:
            groups = row_groups(model.model, [len(row_ids[row]) for row in rows], is_gathered=True)
        if any(limits.values()):
            plans = [(group, deal([longest[rows[i]] for i in group], 1, **limits)[0]) for group in groups]
            groups = [[group[i] for i in part] for group, parts in plans for part in parts]
        for some in ([rows[i] for i in group] for group in groups):
            responses = generate(some, max(len(row_ids[row]) for row in some))
            sampled |= zip(some, zip(*responses, strict=True), strict=True)
        return prompt_ids, sampled

    module = model.actor if isinstance(model, WithoutAdapter) else model
    with gathered(module) if module.sharded else nullcontext():
        shares = map_rows([len(ids) for ids in row_ids], share)
    if any(prompts != prompt_ids for _, (prompts, _) in shares):
        raise ValueError(
            "rollout(prompts): ranks were given different prompts, and every rank needs the whole batch; use "
            "PromptDataModule, or Trainer(use_distributed_sampler=False)"
        )
    by_row = {row: response for _, (_, sampled) in shares for row, response in sampled.items()}
    return [by_row[row] for row in range(len(row_ids))]


def add_logprobs(
    models: Models,
    experience: Experience,
    sampled: Tensor | None = None,
    *,
    temperature: float,
    kl_estimator: KLEstimator,
    limits: Limits,
    tolerance: float | None = None,
) -> float | None:
    """Set log-probs of actor and reference, KL and values, with the forwards that training uses.

    Args:
        models: Actor, reference and critic.
        experience: Sampled by the actor.
        sampled: Log-probs of sampling, (B, T), kept if they differ from the training pass by at most ``tolerance``
            on one micro-batch per rank; None: always run the training pass.
        temperature: Of the log-probs.
        kl_estimator: Of the KL to the reference.
        limits: Size of a micro-batch.
        tolerance: See ``sampled``.

    Returns:
        The difference, where it was measured.
    """
    n_columns = experience.response_ids.shape[1]

    def train(inputs: ModelInputs) -> dict[str, Tensor]:
        return {"logprobs": actor_forward(models.actor, inputs, n_columns, temperature)[0]}

    difference, lengths = None, [n_prompt + n_response for n_prompt, n_response in experience.lengths]
    if sampled is not None and tolerance is not None:
        first = [row for micro_batches in deal(lengths, n_ranks(), **limits) for row in micro_batches[0]]
        trained = map_forwards(train, experience.select(first), [lengths[row] for row in first], limits)["logprobs"]
        difference = float((trained - sampled[first]).abs().max())
        sampled = sampled if difference <= tolerance else None

    def compute(inputs: ModelInputs) -> dict[str, Tensor]:
        computed = train(inputs) if sampled is None else {}
        if models.reference is not None:
            computed["ref_logprobs"] = actor_forward(models.reference, inputs, n_columns, temperature)[0]
        if models.critic is not None:
            computed["values"] = critic_forward(models.critic, inputs, n_columns)
        return computed

    computed = map_forwards(compute, experience, lengths, limits)
    experience.logprobs = computed["logprobs"] if sampled is None else sampled
    experience.ref_logprobs, experience.values = computed.get("ref_logprobs"), computed.get("values")
    if experience.ref_logprobs is None:
        experience.kl = torch.zeros_like(experience.logprobs)
    else:
        experience.kl = kl_estimate(experience.logprobs, experience.ref_logprobs, kl_estimator)
    return difference


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
    """Scores by a source, under the name ``""``; the scores of its parts, if it has any, under their names.

    Args:
        source: See :func:`lit_ppo.rewards.as_source`.
        experience: Responses of all ranks.
        timeout: Seconds that this rank's share may take.

    Shapes:
        -> (B,) float32 each.
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
