"""Score plain text with a reward, as if its last tokens were a response."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lit_ppo.experience import Experience
from lit_ppo.generation.transformers import continuations
from lit_ppo.parallel.sharding import gathered
from lit_ppo.rewards import ScoreSource, place_reward_models, scores_of


class TextReward(nn.Module):
    """A frozen reward that moves between devices with its parent, and is no part of its weights.

    Args:
        source: See :func:`lit_ppo.rewards.as_source`.
        response_tokens: Tokens at the end of a text that are the response.
    """

    source: ScoreSource

    def __init__(self, source: ScoreSource, response_tokens: int) -> None:
        super().__init__()
        vars(self)["source"] = source  # no submodule: its weights stay out of the optimizer and of checkpoints
        self.response_tokens = response_tokens

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        if isinstance(self.source, nn.Module):
            self.source._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def build(self, strategy: Any) -> None:
        """Load the source's reward models; where the strategy shards, each rank keeps its shard."""
        place_reward_models(strategy, self.source)

    @torch.inference_mode(False)
    @torch.no_grad()
    def forward(self, tokenizer: PreTrainedTokenizerBase, texts: list[list[int]], device: torch.device) -> Tensor:
        """Scores of the responses in some texts, longer than a response each.

        Collective if a reward model is sharded; a rank may have no text.

        Shapes:
            -> (B,), float32.
        """
        with gathered(self.source if isinstance(self.source, nn.Module) else None):
            if not texts:
                return torch.empty(0, device=device)
            return scores_of(self.source, self.rows(tokenizer, texts, device)).to(device)

    def rows(self, tokenizer: PreTrainedTokenizerBase, texts: list[list[int]], device: torch.device) -> Experience:
        """Texts as prompts and responses, of which none has ended."""
        n = self.response_tokens
        prompts, responses = [ids[:-n] for ids in texts], [ids[-n:] for ids in texts]
        padded = [torch.tensor(ids, device=device) for ids in prompts]
        real = [torch.ones_like(ids, dtype=torch.bool) for ids in padded]
        response_ids, index = torch.tensor(responses, device=device), torch.arange(len(texts), device=device)
        return Experience(
            prompts=tokenizer.batch_decode(prompts, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            responses=continuations(tokenizer, prompts, responses, skip_special_tokens=True),
            columns={},
            prompt_index=index,
            group=index,
            prompt_ids=pad_sequence(padded, batch_first=True, padding_side="left"),
            prompt_mask=pad_sequence(real, batch_first=True, padding_side="left"),
            response_ids=response_ids,
            response_mask=torch.ones_like(response_ids, dtype=torch.bool),
            ended=torch.zeros(len(texts), dtype=torch.bool, device=device),
        )
