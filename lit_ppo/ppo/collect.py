"""Prompts to scored responses: the same experience on every rank, each rank doing its share of the work."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lit_ppo.data.batch import PromptBatch
from lit_ppo.experience import Experience, ModelInputs, rows_or_stand_in
from lit_ppo.functional import KLEstimator, kl_estimate
from lit_ppo.generation.config import stop_ids
from lit_ppo.generation.engine import Engine, Progress
from lit_ppo.generation.transformers import continuations, pad_ids, uniforms
from lit_ppo.models.actor_critic import Actor, Critic
from lit_ppo.models.lora import WithoutAdapter
from lit_ppo.parallel.ranks import deal, map_rows, n_ranks
from lit_ppo.parallel.sharding import gathered
from lit_ppo.ppo.settings import Models
from lit_ppo.rewards import scores_of, source_names
from lit_ppo.rewards.time_limit import time_limit

Policy = Literal["actor", "reference"]
Limits = dict[str, int | None]  # micro_batch_size, micro_batch_tokens


class RandomStream(NamedTuple):
    """Names the random numbers of a rollout."""

    seed: int
    name: str
    update: int  # training rollouts so far; 0 in a fixed stream


def check_length(models: Models, longest_prompt: int) -> None:
    """Check that prompt plus new tokens fit every model that reads them.

    Raises:
        ValueError: They do not.
    """
    new = int(models.generation.max_new_tokens)
    readers = {
        "actor": models.actor.model,
        "reference": models.reference and models.reference.model,
        "critic": models.critic and models.critic.backbone,
    }
    for name, model in readers.items():
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) if model else None
        if limit is not None and longest_prompt + new > limit:
            raise ValueError(
                f"LitPPO(generation={{'max_new_tokens': {new}}}): a prompt of {longest_prompt} tokens plus {new} new "
                f"tokens exceeds the token limit of the {name}, {limit}; lower max_new_tokens or max_prompt_length"
            )


def sample_responses(
    models: Models,
    batch: PromptBatch,
    samples_per_prompt: int,
    stream: RandomStream | None,
    *,
    policy: Policy = "actor",
    sampling_logprobs: bool = False,
    progress: Progress | None = None,
    device: torch.device,
) -> Experience:
    """Sample ``samples_per_prompt`` responses to each prompt; every rank must be given the same prompts.

    Args:
        models: The policy, its tokenizer and its generation settings.
        batch: Prompts of all ranks.
        samples_per_prompt: Responses to each.
        stream: Where random numbers come from; None: greedy.
        policy: Which model samples.
        sampling_logprobs: Keep the log-probs of the decode loop as ``logprobs``.
        progress: For the progress bar.
        device: Of the experience.

    Raises:
        ValueError: There is no reference to sample from, or ranks were given different prompts.
    """
    model = models.actor if policy == "actor" else models.reference
    if model is None:
        raise ValueError("rollout(policy='reference'): there is no reference; give LitPPO one")
    engine: Engine = model
    n_prompts = len(batch.prompts)
    prompt_of_row = [prompt for prompt in range(n_prompts) for _ in range(samples_per_prompt)]
    ids_of_row = [batch.prompt_ids[prompt] for prompt in prompt_of_row]
    prompt_ids, prompt_mask = pad_ids(ids_of_row, left=True, device=device)
    lengths = prompt_mask.sum(1).tolist()
    draws: Tensor | None = None
    if stream is not None:
        sample_numbers = list(range(samples_per_prompt)) * n_prompts
        draws = uniforms(*stream, prompt_of_row, sample_numbers, int(models.generation.max_new_tokens))

    def generate(rows: list[int]) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
        if not rows:
            return batch.prompt_ids, [], []
        width = max(lengths[row] for row in rows)
        responses = engine.generate(
            prompt_ids[rows, -width:], prompt_mask[rows, -width:], models.generation,
            None if draws is None else draws[rows], logprobs=sampling_logprobs, progress=progress,
        )  # fmt: skip
        return batch.prompt_ids, responses.ids, responses.logprobs

    module = model.actor if isinstance(model, WithoutAdapter) else model
    with gathered(module) if module.sharded else nullcontext():
        shares = map_rows(lengths, generate)
    if any(prompts != batch.prompt_ids for _, (prompts, _, _) in shares):
        raise ValueError(
            "rollout(prompts): ranks were given different prompts, and every rank needs the whole batch; use "
            "PromptDataModule, or Trainer(use_distributed_sampler=False)"
        )
    ids: list[list[int]] = [[] for _ in prompt_of_row]
    logprobs: list[list[float]] = [[] for _ in prompt_of_row]
    for rows, (_, some_ids, some_logprobs) in shares:
        for row, row_ids, row_logprobs in zip(rows, some_ids, some_logprobs, strict=True):
            ids[row], logprobs[row] = row_ids, row_logprobs
    response_ids, response_mask = pad_ids(ids, left=False, device=device)
    stops = stop_ids(models.generation)
    group = torch.tensor(prompt_of_row, device=device)
    experience = Experience(
        prompts=[batch.prompts[prompt] for prompt in prompt_of_row],
        responses=continuations(models.tokenizer, ids_of_row, ids),
        columns={name: [values[prompt] for prompt in prompt_of_row] for name, values in batch.columns.items()},
        prompt_index=batch.prompt_index.to(device)[group],
        group=group,
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        ended=torch.tensor([row[-1] in stops for row in ids], device=device),
    )
    if sampling_logprobs:
        padded = pad_sequence([torch.tensor(row) for row in logprobs], batch_first=True)
        experience.logprobs = padded.to(device)
    return experience


def add_logprobs(
    models: Models,
    experience: Experience,
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
        temperature: Of the log-probs.
        kl_estimator: Of the KL to the reference.
        limits: Size of a micro-batch.
        tolerance: Keep the log-probs of sampling if they differ from the training pass by at most this much on one
            micro-batch per rank; None: always run the training pass.

    Returns:
        The difference, where it was measured.
    """
    sampled: Tensor | None = getattr(experience, "logprobs", None)
    difference = None
    if sampled is not None and tolerance is not None:
        difference = _sampling_difference(models, experience, sampled, temperature, limits)
    reuse = difference is not None and tolerance is not None and difference <= tolerance

    def compute(rows: Experience) -> dict[str, Tensor]:
        inputs, computed = rows.model_inputs(), {}
        if not reuse:
            computed["logprobs"] = actor_forward(models.actor, rows, temperature, inputs)[0]
        if models.reference is not None:
            computed["ref_logprobs"] = actor_forward(models.reference, rows, temperature, inputs)[0]
        if models.critic is not None:
            computed["values"] = critic_forward(models.critic, rows, inputs)
        return computed

    computed = _map_forwards(compute, experience, limits)
    experience.logprobs = sampled if reuse and sampled is not None else computed["logprobs"]
    experience.ref_logprobs = computed.get("ref_logprobs")
    experience.values = computed.get("values")
    if experience.ref_logprobs is None:
        experience.kl = torch.zeros_like(experience.logprobs)
    else:
        experience.kl = kl_estimate(experience.logprobs, experience.ref_logprobs, kl_estimator)
    return difference


def actor_forward(
    model: Actor | WithoutAdapter,
    rows: Experience,
    temperature: float,
    inputs: ModelInputs | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The one training forward: log-probs and entropy (or exact KL) of some rows, (b, T)."""
    ids, mask, target_mask = inputs or rows.model_inputs()
    first, second = model(ids, mask, target_mask=target_mask, temperature=temperature, **kwargs)
    return _widen(first, rows), _widen(second, rows)


def critic_forward(critic: Critic, rows: Experience, inputs: ModelInputs | None = None) -> Tensor:
    """Values of some rows, (b, T)."""
    ids, mask, target_mask = inputs or rows.model_inputs()
    return _widen(critic(ids, mask, target_mask=target_mask), rows)


def exact_kl(module: Any, minibatch: Experience) -> Tensor:
    """KL of the actor to the reference over the whole vocabulary, per token and differentiable.

    Args:
        module: The LitPPO.
        minibatch: Rows of one micro-batch.

    Raises:
        ValueError: There is no reference.

    Shapes:
        -> (B, T).
    """
    if module.reference is None:
        raise ValueError("exact_kl: there is no reference; give LitPPO one")
    inputs = minibatch.model_inputs()
    with torch.no_grad():
        ids, mask, target_mask = inputs
        head = module.reference(ids, mask, target_mask=target_mask, head_inputs=True)
    return actor_forward(module.actor, minibatch, module.temperature, inputs, kl_to=head)[1]


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
        limit = f"rewards of {len(rows)} responses (reward_timeout)"
        with nullcontext() if timeout is None else time_limit(timeout, limit):
            scores = scores_of(source, mine)
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


def _sampling_difference(
    models: Models, experience: Experience, sampled: Tensor, temperature: float, limits: Limits
) -> float:
    """Largest difference between the log-probs of sampling and training, on the first micro-batch of each rank."""
    plan = deal(_lengths(experience), n_ranks(), **limits)
    rows = [row for micro_batches in plan for row in micro_batches[0]]

    def train(some: Experience) -> dict[str, Tensor]:
        return {"logprobs": actor_forward(models.actor, some, temperature)[0]}

    trained = _map_forwards(train, experience.select(rows), limits)["logprobs"]
    return float((trained - sampled[rows]).abs().max())


def _map_forwards(
    function: Callable[[Experience], dict[str, Tensor]], experience: Experience, limits: Limits
) -> dict[str, Tensor]:
    """Run a function on this rank's micro-batches and put the rows of all ranks together, (B, T) each."""

    def run(rows: list[int]) -> dict[str, Tensor]:
        results = function(experience.select(rows_or_stand_in(rows)))
        return {name: value.float().cpu() for name, value in results.items()}

    together: dict[str, Tensor] = {}
    for rows, results in map_rows(_lengths(experience), run, **limits):
        for name, value in results.items():
            all_rows = together.setdefault(name, value.new_zeros(experience.response_ids.shape))
            all_rows[rows] = value[: len(rows)]
    return {name: value.to(experience.response_ids.device) for name, value in together.items()}


def _lengths(experience: Experience) -> list[int]:
    return [n_prompt + n_response for n_prompt, n_response in experience.lengths]


def _widen(x: Tensor, rows: Experience) -> Tensor:
    """Back to the experience's T columns."""
    return pad(x, (0, rows.response_ids.shape[1] - x.shape[1]))
