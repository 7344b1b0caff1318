"""Rewards that are Hugging Face sequence classifiers."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_ppo.attention import autocast
from lit_ppo.constructor import constructor
from lit_ppo.data.chat import Span, checked_options
from lit_ppo.functional import masked_mean
from lit_ppo.models.compute import score_in_float32, token_scores
from lit_ppo.models.positions import row_groups
from lit_ppo.models.stored import checked_model_kwargs
from lit_ppo.parallel.ranks import deal
from lit_ppo.parallel.sharding import build, shard
from lit_ppo.rewards.inputs import Row, conversations, encode, questions_and_answers, warn_too_long
from lit_ppo.rewards.loading import find_label, load_classifier, load_tokenizer, max_tokens
from lit_ppo.validate import LARGEST_COUNT, at_most_one, boolean, integer, one_of, path_or_name, refuse

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
        append_eos: Append the end-of-sequence token to responses that ended, and only to those, as reward models expect
            that were trained with it. None: what the model's config says, as ``LitRewardModel`` leaves it.
        pairs: Score prompt and response as the two segments of ``tokenizer(question, answer)``, as models for
            question-answer pairs expect, instead of one text. ``"auto"``: if the tokenizer puts a separator between the
            two and the model does not come from ``LitRewardModel``.
        chat_template_kwargs: Variables of the chat template, such as ``{enable_thinking: false}``.

    Reads ``experience.prompts``, ``responses`` and ``columns``.
    """

    @constructor
    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        aggregation: Literal["last", "mean"] = "last",
        label: int | str | None = None,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        append_eos: bool | None = None,
        pairs: bool | Literal["auto"] = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.path = path_or_name(self, "model", model)
        self.tokenizer_path = self.path if tokenizer is None else path_or_name(self, "tokenizer", tokenizer)
        self.aggregation, self.label = one_of(self, "aggregation", aggregation, ("last", "mean")), label
        is_name, is_index = isinstance(label, str) and label, isinstance(label, int) and not isinstance(label, bool)
        if label is not None and not is_name and not (is_index and 0 <= int(label) <= LARGEST_COUNT):
            refuse(self, "label", label, "must be the name of a label of the model, or its index, from 0 on")
        self.append_eos = None if append_eos is None else boolean(self, "append_eos", append_eos)
        self.pairs = pairs if isinstance(pairs, str) and pairs == "auto" else boolean(self, "pairs", pairs)
        if pairs and aggregation == "mean":
            refuse(self, "pairs", pairs, "pairs have one score each; use aggregation='last'")
        self.chat_template_kwargs = checked_options(self, chat_template_kwargs)
        at_most_one(self, batch_size=batch_size, batch_tokens=batch_tokens)
        self.batch_size = BATCH_SIZE if batch_size is None else integer(self, "batch_size", batch_size)
        self.batch_tokens = None if batch_tokens is None else integer(self, "batch_tokens", batch_tokens)
        given = checked_model_kwargs(self, model_kwargs)
        self.model_kwargs = {"dtype": torch.float32} | given
        self.names_dtype = not {"dtype", "torch_dtype"}.isdisjoint(given)
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
        model = build(strategy, partial(load_classifier, self.path, self.model_kwargs, alone=self.batch_size == 1))
        trust = bool(self.model_kwargs.get("trust_remote_code"))
        self.tokenizer = load_tokenizer(self.tokenizer_path, trust, needs_offsets=self.aggregation == "mean")
        self.label_index = find_label(self.label, self.path, model.config)
        if self.aggregation == "mean" and not isinstance(getattr(model, "score", None), nn.Module):
            raise _no_token_scores(model)
        self._appends_eos = bool(
            getattr(model.config, "append_eos", False) if self.append_eos is None else self.append_eos
        )
        self._pairs = self._reads_pairs(hasattr(model.config, "append_eos"))
        if self._appends_eos and self.tokenizer.eos_token_id is None:
            refuse(self, "append_eos", True, f"the tokenizer in {self.tokenizer_path!r} has no end-of-sequence token")
        text_config = model.config.get_text_config()
        self._finds_last = text_config.pad_token_id is not None
        if not self._finds_last:  # the stock forward then refuses batches; 0 only has to be a valid id
            text_config.pad_token_id = 0
        self._pad_id = text_config.pad_token_id
        text_config.use_cache = False  # nothing is sampled: keys and values would be copied for nothing
        self._limit = max_tokens(model, self.tokenizer)
        self.model = shard(strategy, score_in_float32(autocast.use(model)), frozen=True)

    def _reads_pairs(self, is_our_own: bool) -> bool:
        """Whether to score pairs; refuses them where the model was trained on one text."""
        added = [self.tokenizer.num_special_tokens_to_add(pair) for pair in (False, True)]
        problem = "its tokenizer puts no token between" if added[0] == added[1] else ""
        problem = "LitRewardModel trained it on joined text" if is_our_own else problem
        if self.pairs is True and problem:
            refuse(
                self,
                "pairs",
                True,
                f"{self.path!r} does not read question and answer apart: {problem}; set it to False",
            )
        return self.pairs is True or (self.pairs == "auto" and not problem)

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
        ended = getattr(experience, "ended", None)
        ended = [True] * len(experience.responses) if ended is None else [bool(end) for end in ended]
        if self._pairs:
            questions, answers = zip(*questions_and_answers(experience), strict=True)
            return self._score(questions, pairs=answers, append_eos=ended)
        texts, spans = conversations(self.tokenizer, str(self), experience, ended, self.chat_template_kwargs)
        rendered = "messages" in experience.columns
        return self._score(texts, spans=spans, append_eos=ended, add_special_tokens=not rendered)

    @torch.no_grad()
    def score_texts(
        self, texts: Sequence[str], spans: Sequence[Span] | None = None, *, add_special_tokens: bool = True
    ) -> Tensor:
        """Scores of complete texts.

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
        return self._score(texts, spans=spans, append_eos=[True] * len(texts), add_special_tokens=add_special_tokens)

    def _score(
        self,
        texts: Sequence[str],
        *,
        append_eos: list[bool],
        spans: Sequence[Span] | None = None,
        pairs: Sequence[str] | None = None,
        add_special_tokens: bool = True,
    ) -> Tensor:
        rows, too_long = encode(
            self.tokenizer, texts, pairs=pairs, spans=spans if self.aggregation == "mean" else None,
            append_eos=append_eos if self._appends_eos else None, add_special_tokens=add_special_tokens,
            limit=self._limit,
        )  # fmt: skip
        if too_long and not self._warned:
            self._warned = True
            warn_too_long(str(self), too_long, len(texts), self._limit)
        if empty := [i for i, row in enumerate(rows) if not row.ids]:
            raise ValueError(f"{self}: text {empty[0]} ({texts[empty[0]]!r}) has no tokens to score")
        scores = torch.empty(len(rows), device=self.model.device)
        for batch in self._batches([len(row.ids) for row in rows]):
            scores[batch] = self._score_batch([rows[row] for row in batch])
        return scores

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Rows of each forward; texts of similar length go together, which saves padding."""
        budget = {"micro_batch_size": self.batch_size, "micro_batch_tokens": self.batch_tokens}
        groups = row_groups(self.model, lengths, is_gathered=True)
        plans = [(rows, deal([lengths[row] for row in rows], n_ranks=1, **budget)[0]) for rows in groups]
        return [[rows[i] for i in batch] for rows, batches in plans for batch in batches]

    def _score_batch(self, rows: list[Row]) -> Tensor:
        """Scores (B,) of right-padded rows: each token has the same position as in its text alone."""
        device = self.model.device
        lengths = torch.tensor([len(ids) for ids, _ in rows], device=device)
        width = int(lengths.max())
        ids = torch.tensor([ids + [self._pad_id] * (width - len(ids)) for ids, _ in rows], device=device)
        attended = torch.arange(width, device=device) < lengths[:, None]
        logits, token_logits = token_scores(self.model, input_ids=ids, attention_mask=attended.long())
        if self.aggregation == "last" and (token_logits is None or (self._finds_last and not self._appends_eos)):
            return logits[:, self.label_index].float()
        if token_logits is None:
            raise _no_token_scores(self.model)
        scores = token_logits[..., self.label_index].float()
        last = scores.gather(1, lengths[:, None] - 1).squeeze(1)
        if self.aggregation == "last":
            return last
        mask = torch.tensor([mask + [False] * (width - len(mask)) for _, mask in rows], device=device)
        return torch.where(mask.any(1), masked_mean(scores, mask, dim=1), last)


def _no_token_scores(model: nn.Module) -> ValueError:
    return ValueError(
        f"RewardModel(aggregation='mean'): {type(model).__name__} gives no score per token; use aggregation='last'"
    )
