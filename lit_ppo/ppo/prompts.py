"""Everything that ``LitPPO.rollout`` takes as prompts, as one kind of batch."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lit_ppo.data.batch import PromptBatch
from lit_ppo.data.encoding import encode_prompts
from lit_ppo.experience import Experience


def as_batch(prompts: Any, tokenizer: PreTrainedTokenizerBase) -> PromptBatch:
    """A batch of encoded prompts.

    Args:
        prompts: Strings, lists of chat messages, or an ``Experience`` (the first row of each group).
        tokenizer: The actor's.

    Raises:
        ValueError: A single prompt outside a list.
    """
    if isinstance(prompts, Experience):
        first_of_group = {group: row for row, group in reversed(list(enumerate(prompts.group.tolist())))}
        first = prompts.select(sorted(first_of_group.values()))
        ids = [row[mask].tolist() for row, mask in zip(first.prompt_ids, first.prompt_mask, strict=True)]
        return PromptBatch(first.prompts, ids, first.prompt_index, first.columns)
    if isinstance(prompts, str) or any(isinstance(prompt, dict) for prompt in prompts):
        raise ValueError(f"rollout(prompts={prompts!r}): one prompt; give a list of prompts")
    texts, ids = encode_prompts(tokenizer, prompts)
    chat = {} if all(isinstance(prompt, str) for prompt in prompts) else {"messages": list(prompts)}
    return PromptBatch(texts, ids, torch.arange(len(texts)), chat)
