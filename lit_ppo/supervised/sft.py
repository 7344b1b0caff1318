"""The cold start: train a causal LM on text."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM

from lit_ppo.supervised.base import SupervisedModule

IGNORED = -100
"""Label of a position that carries no loss, by Hugging Face's convention."""


class LitSFT(SupervisedModule):
    """Trains a causal LM to predict the next token (supervised fine-tuning, or pre-training from scratch).

    Gradient clipping and accumulation are the Trainer's: ``gradient_clip_val``, ``accumulate_grad_batches``.

    Args:
        model: A checkpoint folder or hub name; or the settings of a fresh model, such as
            ``{model_type: llama, hidden_size: 192, ...}``, to which vocabulary size and special ids are added from
            the tokenizer.
        tokenizer: Folder or hub name; None takes the model's own.
        optimizer: Makes the optimizer from the weights.
        scheduler: Makes the learning-rate schedule from the optimizer; one step per optimizer step.
        model_kwargs: Further arguments of ``from_pretrained`` (or, from scratch, ``from_config``), such as
            ``{attn_implementation: eager}``.

    Reads batches of ``input_ids``, ``attention_mask`` and ``labels`` (-100 where there is no loss). Logs
    ``train/loss``, ``val/loss`` (the mean over all tokens) and ``val/perplexity`` (its exponential).

    Raises:
        ValueError: A fresh model has no ``model_type`` or no tokenizer.
    """

    auto_class: ClassVar[Any] = AutoModelForCausalLM

    def __init__(
        self,
        model: str | dict[str, Any],
        tokenizer: str | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, tokenizer, optimizer, scheduler, model_kwargs)
        self.val_loss = MeanMetric()

    def token_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of the next-token losses of a batch in nats, and how many tokens they are of."""
        assert self.model is not None
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits = self.model(**inputs, use_cache=False).logits
        targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # shifts the labels: logits are large to copy
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss, (targets != IGNORED).sum()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean next-token loss of a batch."""
        total, tokens = self.token_losses(batch)
        loss = total / tokens.clamp(min=1)  # a batch of one-token texts has no target
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to the validation loss."""
        total, tokens = self.token_losses(batch)
        self.val_loss.update(total / tokens.clamp(min=1), weight=tokens)

    def on_validation_epoch_end(self) -> None:
        """Logs loss and perplexity over all validation tokens of all ranks."""
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.log("val/perplexity", self.val_loss.compute().exp(), sync_dist=True)  # already the same on all ranks
