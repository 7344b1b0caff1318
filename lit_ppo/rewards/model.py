"""Rewards that are Hugging Face sequence classifiers."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_ppo.functional import masked_mean
from lit_ppo.parallel.plan import deal
from lit_ppo.rewards.function import check_scores

BATCH_SIZE = 32


class RewardModel(nn.Module):
    """Scores the text of prompt and response with a Hugging Face sequence classifier, frozen and in eval mode.

    Nothing is loaded before :meth:`build`. The score is the logit itself. Chat prompts (a column ``messages``) go
    through the chat template of the reward model's own tokenizer. A text longer than the model's positions loses
    its beginning, with a warning.

    Args:
        model: Folder or hub name of an ``AutoModelForSequenceClassification``.
        tokenizer: Folder or hub name; by default the reward model's own folder.
        aggregation: ``"last"``: what the model itself returns for each text alone. ``"mean"``: the mean of its
            per-token scores over the response's tokens (over an empty response, the score at the last token).
        label: Which logit is the reward, by index or name; needed where the model has several.
        batch_size: Most texts in one forward; by default 32.
        batch_tokens: Instead: most tokens in one forward, padding included; a longer text stands alone.
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
        if aggregation not in ("last", "mean"):
            raise ValueError(f"RewardModel(aggregation={aggregation!r}): must be 'last' or 'mean'")
        for argument, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
            if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise ValueError(f"RewardModel({argument}={value!r}): must be an integer, at least 1")
        if batch_size is not None and batch_tokens is not None:
            raise ValueError(f"RewardModel(batch_tokens={batch_tokens}): give it or batch_size, not both")
        self.path, self.tokenizer_path = str(model), str(tokenizer or model)
        self.aggregation, self.label = aggregation, label
        self.batch_size, self.batch_tokens = batch_size or BATCH_SIZE, batch_tokens
        self.model_kwargs = {"dtype": torch.float32} | (model_kwargs or {})
        self.model: Any = None
        self.tokenizer: Any = None
        self._warned = False

    def build(self) -> None:
        """Load model and tokenizer, once.

        Raises:
            ValueError: They cannot be loaded, the head was never trained, or the arguments do not fit the model.
        """
        if self.model is not None:
            return
        model = self._load_model().requires_grad_(False)  # from_pretrained gives eval mode
        self.tokenizer = self._load_tokenizer()
        self.label_index = self._label_index(model.config)
        self._scores_tokens = _scores_tokens(model)
        if self.aggregation == "mean" and not self._scores_tokens:
            raise ValueError(
                f"RewardModel(aggregation='mean'): {type(model).__name__} gives no score per token; "
                "use aggregation='last'"
            )
        text_config = model.config.get_text_config()
        self._finds_last = text_config.pad_token_id is not None
        if not self._finds_last:  # the stock forward refuses batches then; 0 only has to be a valid id
            text_config.pad_token_id = 0
        self._pad_id = text_config.pad_token_id
        self._limit = _positions(model.config, self.tokenizer)
        self.model = model

    def built(self) -> "RewardModel":
        """Itself, after :meth:`build`."""
        self.build()
        return self

    def train(self, mode: bool = True) -> "RewardModel":
        """Stay in eval mode, whatever the module around is switched to."""
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
        """Scores of whole texts.

        Args:
            texts: What the model reads.
            spans: First and one past the last character of each response, for ``aggregation="mean"``; by default
                the whole text.
            add_special_tokens: False where the text brings its own, as a rendered chat template does.

        Shapes:
            -> (B,), float32.
        """
        self.build()
        spans = spans or [(0, len(text)) for text in texts]
        rows = self._encode(texts, spans, add_special_tokens)
        scores = torch.empty(len(rows), device=self.model.device)
        for batch in self._batches([len(ids) for ids, _ in rows]):
            scores[batch] = self._score_batch([rows[row] for row in batch])
        return check_scores(scores, len(texts), f"RewardModel(model={self.path!r})")

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Rows of each forward, alike lengths together: less padding."""
        budget = {"micro_batch_size": self.batch_size, "micro_batch_tokens": self.batch_tokens}
        return deal(lengths, n_ranks=1, **budget)[0]

    def _encode(
        self, texts: Sequence[str], spans: Sequence[tuple[int, int]], add_special_tokens: bool
    ) -> list[tuple[list[int], list[bool]]]:
        """Token ids of each text, and which of them belong to the response."""
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
                "positions and lose their beginning (said once); shorten prompts or responses",
                stacklevel=4,
            )
        rows = []
        for i, (ids, (start, end)) in enumerate(zip(encoded["input_ids"], spans, strict=True)):
            if not ids:
                raise ValueError(f"RewardModel(model={self.path!r}): text {i} ({texts[i]!r}) has no tokens to score")
            offsets = encoded["offset_mapping"][i] if wants_spans else []
            rows.append((ids, [first < end and last > start for first, last in offsets]))
        return rows

    def _score_batch(self, rows: list[tuple[list[int], list[bool]]]) -> Tensor:
        """The rows' scores (B,): right-padded, so that absolute positions are those of each text alone."""
        device = self.model.device
        lengths = torch.tensor([len(ids) for ids, _ in rows], device=device)
        width = int(lengths.max())
        ids = torch.tensor([ids + [self._pad_id] * (width - len(ids)) for ids, _ in rows], device=device)
        attended = torch.arange(width, device=device) < lengths[:, None]
        inputs = {"input_ids": ids, "attention_mask": attended.long()}
        if self.aggregation == "last" and (self._finds_last or not self._scores_tokens):
            return self.model(**inputs).logits[:, self.label_index].float()  # type: ignore[no-any-return]
        scores = _token_scores(self.model, inputs)[..., self.label_index].float()
        last = scores.gather(1, lengths[:, None] - 1).squeeze(1)
        if self.aggregation == "last":
            return last
        mask = torch.tensor([mask + [False] * (width - len(mask)) for _, mask in rows], device=device)
        return torch.where(mask.any(1), masked_mean(scores, mask, dim=1), last)

    def _render(self, messages: list[dict[str, Any]], response: str) -> tuple[str, tuple[int, int]]:
        """The conversation with the response as its last turn, and the response's span in it."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"RewardModel(tokenizer={self.tokenizer_path!r}): prompts are chat messages, but this tokenizer has "
                "no chat template; name one that has, or use plain-text prompts"
            )
        turn = {"role": "assistant", "content": response}
        text: str = self.tokenizer.apply_chat_template([*messages, turn], tokenize=False)
        start = text.rfind(response.strip())  # templates may strip a turn
        if start >= 0:
            return text, (start, start + len(response.strip()))
        # the template rewrote the response: take all that comes after the prompt
        prompt: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        differ = (i for i, (ours, theirs) in enumerate(zip(prompt, text, strict=False)) if ours != theirs)
        return text, (next(differ, min(len(prompt), len(text))), len(text))

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer  # slow to import; configurations are checked without it

        try:
            trust = bool(self.model_kwargs.get("trust_remote_code"))
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_path, trust_remote_code=trust)
        except (OSError, ValueError) as error:
            raise _cannot_load("tokenizer", self.tokenizer_path, error) from error
        if self.aggregation == "mean" and not tokenizer.is_fast:
            raise ValueError(
                f"RewardModel(aggregation='mean'): the tokenizer in {self.tokenizer_path!r} cannot say which tokens "
                "are the response's; give one with a tokenizer.json, or use aggregation='last'"
            )
        tokenizer.truncation_side = "left"
        return tokenizer

    def _load_model(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.path, output_loading_info=True, **{"trust_remote_code": False, **self.model_kwargs}
            )
        except (OSError, ValueError) as error:
            raise _cannot_load("model", self.path, error) from error
        if info["missing_keys"]:  # transformers would score with random weights
            raise ValueError(
                f"RewardModel(model={self.path!r}): the checkpoint lacks {', '.join(sorted(info['missing_keys']))}; "
                "train it as a reward model first, or name one that is"
            )
        return model

    def _label_index(self, config: Any) -> int:
        names = [str(config.id2label[i]) for i in range(config.num_labels)]
        if self.label is None and len(names) == 1:
            return 0
        if isinstance(self.label, str) and self.label in names:
            return names.index(self.label)
        if isinstance(self.label, int) and not isinstance(self.label, bool) and 0 <= self.label < len(names):
            return self.label
        raise ValueError(
            f"RewardModel(label={self.label!r}): {self.path!r} has the labels {', '.join(names)}; "
            f"name one of them, or give its index, 0 to {len(names) - 1}"
        )


def _cannot_load(argument: str, path: str, error: Exception) -> ValueError:
    is_local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or "\\" in path
    reason = "there is no such folder" if is_local and not Path(path).exists() else str(error).splitlines()[0]
    if "contains custom code" in reason:
        reason = "it comes with code of its own, which runs only with model_kwargs: {trust_remote_code: true}"
    return ValueError(
        f"RewardModel({argument}={path!r}): cannot be loaded: {reason}; "
        "give a folder that save_pretrained wrote, or the name of a model on the hub"
    )


def _positions(config: Any, tokenizer: Any) -> float:
    """The longest text that both model and tokenizer can take; tokenizers say 1e30 where they do not know."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    return float(min(positions, tokenizer.model_max_length))


def _token_scores(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(B, T, labels): what the head gave at every token before the stock forward picked one of them.

    Read in passing, so that the model's own forward, which sharding relies on, is the one that runs.
    """
    caught: list[Tensor] = []
    handle = model.score.register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        model(**inputs)
    finally:
        handle.remove()
    return caught[0]


@torch.no_grad()
def _scores_tokens(model: Any) -> bool:
    """Whether the head is applied to every token, rather than to a pooled state."""
    if not isinstance(getattr(model, "score", None), nn.Module):
        return False
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    return _token_scores(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).shape[:-1] == (1, 2)
