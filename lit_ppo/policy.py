"""Models, rollouts and scores: the half of LitPPO that fires no hooks and takes no steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lit_ppo.data import PromptBatch, encode_prompts
from lit_ppo.distributed import gather_shares, n_ranks, rank
from lit_ppo.experience import Experience, model_inputs
from lit_ppo.functional import KLEstimator, kl_estimate
from lit_ppo.models import Actor, Critic, Reference
from lit_ppo.plan import Plan, deal
from lit_ppo.reward_functions import check_scores
from lit_ppo.rollout import stop_ids, uniforms


class Policy(L.LightningModule):
    """Rollouts and scores over all ranks: a global batch goes in, a global batch comes out."""

    actor: Actor
    critic: Critic | None
    reference: Reference | None
    rewards: Callable[[Any], Tensor]
    generation: GenerationConfig
    kl_estimator: KLEstimator
    samples_per_prompt: int
    micro_batch_size: int | None
    micro_batch_tokens: int | None
    temperature: float
    seed: int
    rollouts: int  # training rollouts so far: the update's number in every random draw
    phase: str
    seconds: dict[str, float]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The actor's tokenizer, loaded when first needed."""
        raise AttributeError("a subclass says where it comes from")

    @torch.inference_mode(False)
    @torch.no_grad()
    def rollout(
        self,
        prompts: Any,
        *,
        samples_per_prompt: int | None = None,
        do_sample: bool = True,
        policy: Literal["actor", "reference"] = "actor",
        logprobs: bool = True,
        stream: str | None = None,
    ) -> Experience:
        """Sample responses; the same on every rank, however rows are dealt to them.

        Args:
            prompts: Strings, lists of chat messages, a ``PromptBatch``, or an ``Experience`` (the first row of
                each group).
            samples_per_prompt: The module's by default.
            do_sample: False is greedy.
            policy: Who writes.
            logprobs: Also compute log-probs, reference log-probs, KL and values.
            stream: Where the random numbers come from: None is the training stream, which moves on with each
                rollout; a name is a fixed stream of its own.

        Raises:
            ValueError: No prompts, or prompt plus new tokens beyond the model's positions.
        """
        self.configure_model()  # without a Trainer nobody else does
        batch = self._as_batch(prompts)
        experience = self._sample(batch, samples_per_prompt or self.samples_per_prompt, do_sample, policy, stream)
        if stream is None:
            self.rollouts += 1
        if logprobs:
            self._add_statistics(experience)
        return experience

    @torch.inference_mode(False)
    @torch.no_grad()
    def score(self, experience: Experience) -> Tensor:
        """Scores of the responses; with several sources each one's are left in ``extras`` under its name.

        Shapes:
            -> (B,) float32.
        """
        self.configure_model()
        plan = deal([1] * len(experience), n_ranks())
        rows = plan[rank()][0]

        def share() -> dict[str, Tensor]:
            if not rows:
                return {}
            mine = experience.select(rows)
            scores = check_scores(self.rewards(mine), len(mine), "rewards", mine.responses)
            return {"": scores.cpu(), **{name: mine.extras[name].cpu() for name in self.source_names}}

        parts = gather_shares(share)
        named = {name: torch.empty(len(experience), device=self.device) for part in parts for name in part}
        for part, micro_batches in zip(parts, plan, strict=True):
            for name, values in part.items():
                named[name][micro_batches[0]] = values.to(self.device)
        scores = named.pop("")
        experience.extras.update(named)
        return scores

    def actor_forward(self, model: Actor, rows: Experience, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The one training forward, on some rows: log-probs and entropy (or exact KL), (b, T)."""
        ids, mask, target_mask = model_inputs(rows)
        first, second = model(ids, mask, target_mask=target_mask, temperature=self.temperature, **kwargs)
        return _widen(first, rows), _widen(second, rows)

    def critic_forward(self, critic: Critic, rows: Experience) -> Tensor:
        """Values of some rows, (b, T)."""
        ids, mask, target_mask = model_inputs(rows)
        return _widen(critic(ids, mask, target_mask=target_mask), rows)

    def plan(self, lengths: Sequence[int]) -> Plan:
        """Rows dealt to ranks and micro-batches."""
        return deal(
            lengths, n_ranks(), micro_batch_size=self.micro_batch_size, micro_batch_tokens=self.micro_batch_tokens
        )

    @property
    def source_names(self) -> list[str]:
        """Names of the rewards where there are several; ``score`` leaves each one's in ``extras``."""
        return list(getattr(self.rewards, "sources", {}))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note the phase at work, for the progress bar, and its seconds."""
        before, self.phase, start = self.phase, phase, perf_counter()
        try:
            yield
        finally:
            self.phase = before
            self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - start

    def _as_batch(self, prompts: Any) -> PromptBatch:
        if isinstance(prompts, PromptBatch):
            batch = prompts
        elif isinstance(prompts, Experience):
            seen: dict[int, int] = {}
            for row, group in enumerate(prompts.group.tolist()):
                seen.setdefault(group, row)
            first = prompts.select(list(seen.values()))
            ids = [row[mask].tolist() for row, mask in zip(first.prompt_ids, first.prompt_mask, strict=True)]
            batch = PromptBatch(first.prompts, ids, first.prompt_index, first.columns)
        else:
            if isinstance(prompts, str) or any(isinstance(prompt, dict) for prompt in prompts):
                raise ValueError(f"rollout(prompts={prompts!r}): one prompt; give a list of prompts")
            texts, ids = encode_prompts(self.tokenizer, prompts)
            chat = {} if all(isinstance(prompt, str) for prompt in prompts) else {"messages": list(prompts)}
            batch = PromptBatch(texts, ids, torch.arange(len(texts)), chat)
        if not batch.prompts:
            raise ValueError("rollout(prompts=[]): is empty; give at least one prompt")
        self.check_length(max(len(ids) for ids in batch.prompt_ids))
        return batch

    def check_length(self, longest_prompt: int) -> None:
        """Check that prompt plus new tokens fit the positions of every model that reads them.

        Raises:
            ValueError: They do not.
        """
        new = int(self.generation.max_new_tokens)
        models = {
            "actor": self.actor.model,
            "reference": self.reference and self.reference.model,
            "critic": self.critic and self.critic.backbone,
        }
        for name, model in models.items():
            limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) if model else None
            if limit is not None and longest_prompt + new > limit:
                raise ValueError(
                    f"LitPPO(generation={{'max_new_tokens': {new}}}): a prompt of {longest_prompt} tokens plus {new} "
                    f"new ones is beyond the {name}'s {limit} positions; lower max_new_tokens or max_prompt_length"
                )

    def _sample(self, batch: PromptBatch, samples: int, do_sample: bool, policy: str, stream: str | None) -> Experience:
        """Sample ``samples`` responses to each prompt."""
        rows = [row for row in range(len(batch.prompts)) for _ in range(samples)]
        prompt_ids, prompt_mask = pad_ids([batch.prompt_ids[row] for row in rows], left=True, device=self.device)
        draws = None
        if do_sample:
            numbers = list(range(samples)) * len(batch.prompts)
            key = (self.seed, stream or "train", self.rollouts if stream is None else 0)
            draws = uniforms(*key, rows, numbers, int(self.generation.max_new_tokens))
        ids = self._generate(batch, policy, prompt_ids, prompt_mask, draws)
        response_ids, response_mask = pad_ids(ids, left=False, device=self.device)
        stops = stop_ids(self.generation)
        group = torch.tensor(rows, device=self.device)
        return Experience(
            prompts=[batch.prompts[row] for row in rows],
            responses=self._continuations([batch.prompt_ids[row] for row in rows], ids),
            columns={name: [values[row] for row in rows] for name, values in batch.columns.items()},
            prompt_index=batch.prompt_index.to(self.device)[group],
            group=group,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=response_ids,
            response_mask=response_mask,
            ended=torch.tensor([row[-1] in stops for row in ids], device=self.device),
        )

    def _generate(
        self, batch: PromptBatch, policy: str, prompt_ids: Tensor, prompt_mask: Tensor, draws: Tensor | None
    ) -> list[list[int]]:
        """Generate this rank's share of rows and gather all; every rank must have been given the same prompts."""
        model = self.actor if policy == "actor" else self.reference
        if model is None:
            raise ValueError("rollout(policy='reference'): there is no reference; give LitPPO one")
        lengths = prompt_mask.sum(1).tolist()
        shares = [micro_batches[0] for micro_batches in deal(lengths, n_ranks())]

        def share() -> tuple[list[list[int]], list[list[int]]]:
            mine = shares[rank()]
            if not mine:
                return batch.prompt_ids, []
            width = max(lengths[row] for row in mine)
            inputs = (prompt_ids[mine, -width:], prompt_mask[mine, -width:])
            return batch.prompt_ids, model.generate(*inputs, self.generation, None if draws is None else draws[mine])

        asked, sampled = zip(*gather_shares(share), strict=True)
        if any(prompts != asked[0] for prompts in asked):
            raise ValueError(
                "rollout(prompts): ranks were given different prompts, and every rank needs the whole batch; use "
                "PromptDataModule, or Trainer(use_distributed_sampler=False)"
            )
        pairs = (zip(mine, part, strict=True) for mine, part in zip(shares, sampled, strict=True))
        by_row = {row: ids for pair in pairs for row, ids in pair}
        return [by_row[row] for row in range(len(prompt_ids))]

    def _continuations(self, prompt_ids: list[list[int]], response_ids: list[list[int]]) -> list[str]:
        """Responses as they continue their prompts: decoded alone, many tokenizers drop the space in front."""

        def decode(rows: list[list[int]]) -> list[str]:
            options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            return self.tokenizer.batch_decode(rows, **options)

        before = decode(prompt_ids)
        whole = decode([prompt + response for prompt, response in zip(prompt_ids, response_ids, strict=True)])
        alone = decode(response_ids)
        texts = zip(whole, before, alone, strict=True)
        return [text[len(start) :] if text.startswith(start) else rest for text, start, rest in texts]

    def _add_statistics(self, experience: Experience) -> None:
        """Log-probs of actor and reference, KL and values, by the same forwards that training uses."""

        def of_rows(rows: Experience) -> dict[str, Tensor]:
            computed = {"logprobs": self.actor_forward(self.actor, rows)[0]}
            if self.reference is not None:
                computed["ref_logprobs"] = self.actor_forward(self.reference, rows)[0]
            if self.critic is not None:
                computed["values"] = self.critic_forward(self.critic, rows)
            return computed

        computed = self._map_rows(of_rows, experience)
        experience.logprobs = computed["logprobs"]
        experience.ref_logprobs = computed.get("ref_logprobs")
        experience.values = computed.get("values")
        if experience.ref_logprobs is None:
            experience.kl = torch.zeros_like(experience.logprobs)
        else:
            experience.kl = kl_estimate(experience.logprobs, experience.ref_logprobs, self.kl_estimator)

    def _map_rows(
        self, function: Callable[[Experience], dict[str, Tensor]], experience: Experience
    ) -> dict[str, Tensor]:
        """Run over this rank's micro-batches and gather the rows of all; every rank runs as many forwards."""
        plan = self.plan([sum(both) for both in experience.lengths])

        def share() -> list[dict[str, Tensor]]:
            parts = [function(experience.select(rows or [0])) for rows in plan[rank()]]
            return [{name: value.float().cpu() for name, value in part.items()} for part in parts]

        gathered: dict[str, Tensor] = {}
        for micro_batches, parts in zip(plan, gather_shares(share), strict=True):
            for rows, part in zip(micro_batches, parts, strict=True):
                for name, value in part.items():
                    whole = gathered.setdefault(name, value.new_zeros(experience.response_ids.shape))
                    whole[rows] = value[: len(rows)]
        return {name: value.to(self.device) for name, value in gathered.items()}


def pad_ids(rows: Sequence[Sequence[int]], *, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids padded with 0, and the mask that tells padding from tokens.

    Shapes:
        -> (B, L), (B, L).
    """
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    side = "left" if left else "right"
    ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side)
    mask = nn.utils.rnn.pad_sequence(
        [torch.ones_like(row, dtype=torch.bool) for row in tensors], batch_first=True, padding_side=side
    )
    return ids.to(device), mask.to(device)


def _widen(x: Tensor, rows: Experience) -> Tensor:
    """Back to the experience's T columns."""
    return pad(x, (0, rows.response_ids.shape[1] - x.shape[1]))
