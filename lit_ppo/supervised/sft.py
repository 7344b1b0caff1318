"""Supervised fine-tuning (SFT): train a causal LM on text."""

from collections import Counter
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_ppo.constructor import constructor
from lit_ppo.optim.precision import MatmulPrecision
from lit_ppo.supervised.base import SupervisedModule
from lit_ppo.supervised.head import use_float32_logits
from lit_ppo.supervised.source import ModelSource

BATCHES_COUNTED = 16  # to see which token ends a text; reading labels makes a GPU wait
IGNORED = -100
"""Label of a token without loss, as in Hugging Face's models."""


class LitSFT(SupervisedModule):
    """Trains a causal LM to predict the next token (supervised fine-tuning, or pre-training from scratch).

    Gradient clipping and accumulation are the Trainer's: ``gradient_clip_val``, ``accumulate_grad_batches``. All tokens
    of a batch count alike, on however many ranks. Accumulated batches count alike, too, however many tokens each has.

    Args:
        model: Folder or hub name of a checkpoint, or the settings of a new model, such as
            ``{model_type: llama, hidden_size: 192, ...}``. A new model gets its vocabulary size and special token ids
            from the tokenizer.
        tokenizer: Folder or hub name; None uses the model's.
        optimizer: From parameters to optimizer.
        scheduler: From optimizer to learning-rate schedule, one step per optimizer step.
        model_kwargs: More arguments of ``from_pretrained`` (for a new model, of ``from_config``), such as
            ``{attn_implementation: eager}``.
        float32_matmul_precision: ``"highest"``, ``"high"`` (TF32) or ``"medium"``. None: on CUDA ``"high"``.

    Reads batches of ``input_ids``, ``attention_mask`` and ``labels`` (-100 where there is no loss). In validation,
    rows of ``weight`` 0 do not count. Logs ``train/loss``, ``val/loss`` (the mean over all tokens) and
    ``val/perplexity`` (its exponential).

    Raises:
        ValueError: A new model has no ``model_type`` or no tokenizer.
    """

    method, task, objective = "SFT", "text-generation", "the next token of text (cross-entropy)"

    @constructor
    def __init__(
        self,
        model: str | dict[str, Any],
        tokenizer: str | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-6, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        model_kwargs: dict[str, Any] | None = None,
        float32_matmul_precision: MatmulPrecision | None = None,
    ) -> None:
        source = ModelSource(type(self).__name__, AutoModelForCausalLM, model, tokenizer, model_kwargs)
        super().__init__(source, optimizer, scheduler, float32_matmul_precision)
        self.val_loss = MeanMetric()
        self._ends: Counter[int | None] = Counter()
        self._counted = 0

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        use_float32_logits(model)
        return model

    def token_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of a batch's next-token losses in nats, and the number of tokens with a loss."""
        assert self.model is not None
        # shift the labels, because a copy of the logits is large
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        losses = []
        for rows, width in self.groups(batch["attention_mask"]):
            inputs = {key: batch[key][rows, :width] for key in ("input_ids", "attention_mask")}
            logits = self.model(**inputs, use_cache=False).logits.float().flatten(0, 1)
            labels = targets[rows, :width].flatten()
            losses.append(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        return torch.stack(losses).sum(), (targets != IGNORED).sum()

    def trained_stop(self) -> int | None:
        """The special token that ended most of the texts that training began with, such as a chat's end of turn."""
        (token, count), *_ = self._ends.most_common(1) or [(None, 0)]
        return token if 2 * count > self._ends.total() else None

    def _count_ends(self, labels: Tensor) -> None:
        """Which special token is the last of each part with a loss; a template may put a line break behind it.

        A chat's part that fills its row to the end was cut off there, as in packed rows, unless it has such a token.
        """
        tokenizer = self.tokenizer
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        special -= {tokenizer.unk_token_id, tokenizer.bos_token_id}
        rows = labels.tolist()
        parts = [[list(part) for has_loss, part in groupby(row, IGNORED.__ne__) if has_loss] for row in rows]
        is_chat = any(row[0] == IGNORED or len(found) > 1 for row, found in zip(rows, parts, strict=True))
        for row, found in zip(rows, parts, strict=True):
            for part in found:
                stop = next((token for token in reversed(part[-3:]) if token in special), None)
                is_cut = is_chat and part is found[-1] and row[-1] != IGNORED
                if stop is not None or not is_cut:
                    self._ends[stop] += 1
        self._counted += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["ends"] = {"counts": dict(self._ends), "batches": self._counted}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        ends = checkpoint.get("ends", {"counts": {}, "batches": 0})
        self._ends, self._counted = Counter(ends["counts"]), ends["batches"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self._counted < BATCHES_COUNTED:
            self._count_ends(batch["labels"])
        loss, mean = self.mean_over_ranks(*self.token_losses(batch))  # texts of one token have no target
        self.log("train/loss", mean, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if "weight" in batch:
            batch = {**batch, "labels": batch["labels"].masked_fill(batch["weight"][:, None] == 0, IGNORED)}
        total, tokens = self.token_losses(batch)
        self.val_loss.update(total / tokens.clamp(min=1), weight=tokens)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.log("val/perplexity", self.val_loss.compute().exp(), sync_dist=True)  # equal on all ranks
