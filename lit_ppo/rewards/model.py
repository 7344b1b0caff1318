"""Rewards that are Hugging Face sequence classifiers."""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_ppo.functional import masked_mean
from lit_ppo.parallel.ranks import deal
from lit_ppo.parallel.sharding import build, shard
from lit_ppo.rewards.loading import find_label, load_classifier, load_tokenizer, max_tokens
from lit_ppo.special_tokens import without_repeats
from lit_ppo.validate import at_most_one, integer, one_of

BATCH_SIZE = 32


class RewardModel(nn.Module):
    """Scores prompt plus response with a frozen Hugging Face sequence classifier.

    Nothing is loaded before :meth:`build`. The score is the raw logit. Chat prompts (a column ``messages``) are
    rendered with the chat template of the reward model's own tokenizer. A text with more tokens than the model has
    positions loses its beginning, with a warning.

    Args:
        model: Folder or hub name of an ``AutoModelForSequenceClassification``.
        tokenizer: Folder or hub name; by default the reward model's own folder.
        aggregation: ``"last"``: the score that the model returns for each text alone. ``"mean"``: the mean of its
            per-token scores over the response's tokens (for an empty response, the score at the last token).
        label: Which logit is the reward, by index or name; required where the model has several.
        batch_size: Maximum number of texts in one forward; by default 32.
        batch_tokens: Instead: maximum number of tokens in one forward, padding included; a longer text is scored
            alone.
        model_kwargs: Passed to ``from_pretrained``; float32 unless ``dtype`` is among them.

    Reads ``experience.prompts``, ``responses`` and ``columns``.
    """

    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        aggregation: Literal["last", "mean"] = "last",
        label: int | str | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.path, self.tokenizer_path = str(model), str(tokenizer or model)
        self.aggregation, self.label = one_of(self, "aggregation", aggregation, ("last", "mean")), label
        at_most_one(self, batch_size=batch_size, batch_tokens=batch_tokens)
        self.batch_size = BATCH_SIZE if batch_size is None else integer(self, "batch_size", batch_size)
        self.batch_tokens = None if batch_tokens is None else integer(self, "batch_tokens", batch_tokens)
        self.model_kwargs = {"dtype": torch.float32} | (model_kwargs or {})
        self.model: Any = None
        self.tokenizer: Any = None
        self._warned = False

    def build(self, strategy: Any = None) -> None:
        """Load model and tokenizer, once; where the strategy shards, rank 0 loads and each rank keeps its shard.

        Args:
            strategy: The Trainer's; None without one.

        Raises:
            ValueError: They cannot be loaded, the head was never trained, or the arguments do not fit the model.
        """
        if self.model is not None:
            return
        model = build(strategy, partial(load_classifier, self.path, self.model_kwargs))
        trust = bool(self.model_kwargs.get("trust_remote_code"))
        self.tokenizer = load_tokenizer(self.tokenizer_path, trust, needs_offsets=self.aggregation == "mean")
        self.label_index = find_label(self.label, self.path, model.config)
        if self.aggregation == "mean" and not isinstance(getattr(model, "score", None), nn.Module):
            raise _no_token_scores(model)
        text_config = model.config.get_text_config()
        self._finds_last = text_config.pad_token_id is not None
        if not self._finds_last:  # the stock forward then refuses batches; 0 only has to be a valid id
            text_config.pad_token_id = 0
        self._pad_id = text_config.pad_token_id
        self._limit = max_tokens(model.config, self.tokenizer)
        self.model = shard(strategy, model, frozen=True)

    def __str__(self) -> str:
        return f"{type(self).__name__}(model={self.path!r})"

    def train(self, mode: bool = True) -> "RewardModel":
        """Stay in eval mode when the parent module switches to training mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, experience: Any) -> Tensor:
        """Scores of the responses.

        Shapes:
            -> (B,), float32.
        """
        self.build()
        messages = experience.columns.get("messages")
        if messages is None:
            pairs = list(zip(experience.prompts, experience.responses, strict=True))
            texts = [prompt + response for prompt, response in pairs]
            spans = [(len(prompt), len(prompt) + len(response)) for prompt, response in pairs]
        else:
            rendered = [self._render(*turns) for turns in zip(messages, experience.responses, strict=True)]
            texts, spans = [text for text, _ in rendered], [span for _, span in rendered]
        return self.score_texts(texts, spans, add_special_tokens=messages is None)

    @torch.no_grad()
    def score_texts(
        self, texts: Sequence[str], spans: Sequence[tuple[int, int]] | None = None, *, add_special_tokens: bool = True
    ) -> Tensor:
        """Scores of texts.

        Args:
            texts: Prompt and response together.
            spans: First and one past the last character of each response, for ``aggregation="mean"``; by default
                the full text.
            add_special_tokens: False where the text has its own, as a rendered chat template does.

        Shapes:
            -> (B,), float32.
        """
        self.build()
        spans = spans or [(0, len(text)) for text in texts]
        rows = self._encode(texts, spans, add_special_tokens)
        scores = torch.empty(len(rows), device=self.model.device)
        for batch in self._batches([len(ids) for ids, _ in rows]):
            scores[batch] = self._score_batch([rows[row] for row in batch])
        return scores

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Rows of each forward; texts of similar length go together, which saves padding."""
        budget = {"micro_batch_size": self.batch_size, "micro_batch_tokens": self.batch_tokens}
        return deal(lengths, n_ranks=1, **budget)[0]

    def _encode(
        self, texts: Sequence[str], spans: Sequence[tuple[int, int]], add_special_tokens: bool
    ) -> list[tuple[list[int], list[bool]]]:
        """Token ids of each text, and a mask that is True where they belong to the response."""
        wants_spans = self.aggregation == "mean"
        options = {"add_special_tokens": add_special_tokens, "return_offsets_mapping": wants_spans, "verbose": False}
        encoded = self.tokenizer(list(texts), **options)
        too_long = sum(len(ids) > self._limit for ids in encoded["input_ids"])
        if too_long:
            encoded = self.tokenizer(list(texts), truncation=True, max_length=int(self._limit), **options)
        if too_long and not self._warned:
            self._warned = True
            warnings.warn(
                f"RewardModel(model={self.path!r}): {too_long} of {len(texts)} texts exceed its {self._limit:g} "
                "positions and lose their beginning (warned once); shorten prompts or responses",
                stacklevel=4,
            )
        rows = []
        for i, (ids, (start, end)) in enumerate(zip(encoded["input_ids"], spans, strict=True)):
            if not ids:
                raise ValueError(f"RewardModel(model={self.path!r}): text {i} ({texts[i]!r}) has no tokens to score")
            offsets = encoded["offset_mapping"][i] if wants_spans else []
            if add_special_tokens:
                kept = without_repeats(self.tokenizer, ids)
                ids, offsets = ids[kept], offsets[kept]
            rows.append((ids, [first < end and last > start for first, last in offsets]))
        return rows

    def _score_batch(self, rows: list[tuple[list[int], list[bool]]]) -> Tensor:
        """Scores (B,) of right-padded rows: each token has the same position as in its text alone."""
        device = self.model.device
        lengths = torch.tensor([len(ids) for ids, _ in rows], device=device)
        width = int(lengths.max())
        ids = torch.tensor([ids + [self._pad_id] * (width - len(ids)) for ids, _ in rows], device=device)
        attended = torch.arange(width, device=device) < lengths[:, None]
        logits, token_logits = _logits(self.model, {"input_ids": ids, "attention_mask": attended.long()})
        if self.aggregation == "last" and (self._finds_last or token_logits is None):
            return logits[:, self.label_index].float()
        if token_logits is None:
            raise _no_token_scores(self.model)
        scores = token_logits[..., self.label_index].float()
        last = scores.gather(1, lengths[:, None] - 1).squeeze(1)
        if self.aggregation == "last":
            return last
        mask = torch.tensor([mask + [False] * (width - len(mask)) for _, mask in rows], device=device)
        return torch.where(mask.any(1), masked_mean(scores, mask, dim=1), last)

    def _render(self, messages: list[dict[str, Any]], response: str) -> tuple[str, tuple[int, int]]:
        """The chat with the response as its last turn, and the first and one past the last character of it."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"RewardModel(tokenizer={self.tokenizer_path!r}): prompts are chat messages, but this tokenizer has "
                "no chat template; name one that has one, or use plain-text prompts"
            )
        turn = {"role": "assistant", "content": response}
        text: str = self.tokenizer.apply_chat_template([*messages, turn], tokenize=False)
        start = text.rfind(response.strip())  # templates may strip a turn
        if start >= 0:
            return text, (start, start + len(response.strip()))
        # the template changed the response: everything after the prompt counts as the response
        prompt: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        differ = (i for i, (ours, theirs) in enumerate(zip(prompt, text, strict=False)) if ours != theirs)
        return text, (next(differ, min(len(prompt), len(text))), len(text))


def _no_token_scores(model: nn.Module) -> ValueError:
    return ValueError(
        f"RewardModel(aggregation='mean'): {type(model).__name__} gives no score per token; use aggregation='last'"
    )


def _logits(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Logits of the texts (B, labels), and of every token (B, T, labels) where the head is applied to each token.

    A hook reads the latter, so that the model's own forward runs, which sharding relies on.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Module):
        return model(**inputs).logits, None
    outputs: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    return logits, outputs[0] if outputs[0].shape[:-1] == inputs["input_ids"].shape else None
