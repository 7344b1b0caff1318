"""Prompts to the experience of all ranks: what is sampled, each rank doing its share."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lit_ppo.data.batch import PromptBatch
from lit_ppo.data.encoding import encode_prompts
from lit_ppo.experience import Experience
from lit_ppo.generation.transformers import stop_ids, uniforms
from lit_ppo.models.actor_critic import Actor, Critic, Reference
from lit_ppo.models.lora import WithoutAdapter
from lit_ppo.parallel.ranks import deal, gather_shares, n_ranks, rank
from lit_ppo.parallel.sharding import gathered


class Sampling(L.LightningModule):
    """Samples responses; the same on every rank, however rows are dealt to them."""

    actor: Actor
    critic: Critic | None
    reference: Reference | WithoutAdapter | None
    generation: GenerationConfig
    sampling_logprobs_tolerance: float | None
    phase_detail: str  # how far the phase at work is, for the progress bar
    seed: int
    rollouts: int  # training rollouts so far: the update's number in every random draw

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The actor's tokenizer, loaded when first needed."""
        raise AttributeError("a subclass says where it comes from")

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
        ids, logprobs = self._generate(batch, policy, prompt_ids, prompt_mask, draws)
        response_ids, response_mask = pad_ids(ids, left=False, device=self.device)
        stops = stop_ids(self.generation)
        group = torch.tensor(rows, device=self.device)
        experience = Experience(
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
        if policy == "actor" and self.sampling_logprobs_tolerance is not None:
            padded = pad_sequence([torch.tensor(row) for row in logprobs], batch_first=True)
            experience.logprobs = padded.to(self.device)
        return experience

    def _generate(
        self, batch: PromptBatch, policy: str, prompt_ids: Tensor, prompt_mask: Tensor, draws: Tensor | None
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Generate this rank's share of rows and gather all; every rank must have been given the same prompts.

        Returns:
            Token ids and their log-probs, row by row.
        """
        model = self.actor if policy == "actor" else self.reference
        if model is None:
            raise ValueError("rollout(policy='reference'): there is no reference; give LitPPO one")
        lengths = prompt_mask.sum(1).tolist()
        shares = [micro_batches[0] for micro_batches in deal(lengths, n_ranks())]

        def share() -> tuple[list[list[int]], list[tuple[list[int], list[float]]]]:
            mine = shares[rank()]
            if not mine:
                return batch.prompt_ids, []
            width = max(lengths[row] for row in mine)
            inputs = (prompt_ids[mine, -width:], prompt_mask[mine, -width:])
            logprobs: list[list[float]] | None = None if self.sampling_logprobs_tolerance is None else []
            chosen = None if draws is None else draws[mine]
            ids = model.generate(*inputs, self.generation, chosen, logprobs, self._at_token)
            return batch.prompt_ids, list(zip(ids, logprobs or [[]] * len(ids), strict=True))

        with gathered(model.actor if isinstance(model, WithoutAdapter) else model):
            asked, sampled = zip(*gather_shares(share), strict=True)
        if any(prompts != asked[0] for prompts in asked):
            raise ValueError(
                "rollout(prompts): ranks were given different prompts, and every rank needs the whole batch; use "
                "PromptDataModule, or Trainer(use_distributed_sampler=False)"
            )
        pairs = (zip(mine, part, strict=True) for mine, part in zip(shares, sampled, strict=True))
        by_row = {row: response for pair in pairs for row, response in pair}
        responses = [by_row[row] for row in range(len(prompt_ids))]
        return [ids for ids, _ in responses], [logprobs for _, logprobs in responses]

    def _at_token(self, number: int) -> None:
        self.phase_detail = f"token {number}/{self.generation.max_new_tokens}"

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
