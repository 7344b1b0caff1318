"""Train a reward model on pairs of texts or on labelled texts."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from lit_ppo.supervised.base import SupervisedModule, load


class LitRewardModel(SupervisedModule):
    """Trains a sequence classifier with one output, the reward, on preferences or on labels.

    Pairs are trained by the Bradley-Terry loss ``-log sigmoid(r_chosen - r_rejected)``, labels by binary cross-entropy
    of ``sigmoid(r)``: the data decide which. A pair counts as right where the chosen text scores higher, a labelled
    text where the sign of its score is its label's.

    Args:
        model: A checkpoint folder or hub name (of a causal LM too: it is given a new head); or the settings of a
            fresh model, such as ``{model_type: llama, hidden_size: 192, ...}``.
        tokenizer: Folder or hub name; None takes the model's own.
        optimizer: Makes the optimizer from the weights.
        scheduler: Makes the learning-rate schedule from the optimizer; one step per optimizer step.
        model_kwargs: Further arguments of ``from_pretrained`` (or, from scratch, ``from_config``), such as
            ``{attn_implementation: eager}``.

    Reads batches of ``chosen`` and ``rejected``, each with ``input_ids`` and ``attention_mask``; or of ``input_ids``,
    ``attention_mask`` and ``labels`` (0 or 1, or a probability). Logs ``train/loss``, ``train/accuracy``, ``val/loss``
    and ``val/accuracy``.
    Source: Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, section 3.5.

    Raises:
        ValueError: A fresh model has no ``model_type`` or no tokenizer; or, when it is loaded, a checkpoint's head has
            several outputs.
    """

    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    config_overrides: ClassVar[dict[str, Any]] = {"num_labels": 1}

    def __init__(
        self,
        model: str | dict[str, Any],
        tokenizer: str | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, tokenizer, optimizer, scheduler, model_kwargs)
        self.train_accuracy, self.val_accuracy = BinaryAccuracy(), BinaryAccuracy()
        self.val_loss = MeanMetric()

    def _from_pretrained(self, path: str) -> PreTrainedModel:
        config = load(self, "model", AutoConfig, path)
        has_head = any("ForSequenceClassification" in name for name in config.architectures or [])
        if has_head and config.num_labels != 1 and not self._model_kwargs.get("ignore_mismatched_sizes"):
            raise ValueError(
                f"LitRewardModel(model={path!r}): its head has {config.num_labels} outputs and a reward is 1; to start "
                "from it with a new head, add model_kwargs={'ignore_mismatched_sizes': True}"
            )
        return super()._from_pretrained(path)

    def rewards(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The model's scores of a batch of right-padded texts, (B,)."""
        assert self.model is not None
        scores: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return scores.squeeze(-1).float()

    def margins(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits that should be positive where the target is 1, and the targets."""
        if "chosen" in batch:
            scores = self.rewards(*self._side_by_side(batch["chosen"], batch["rejected"]))
            chosen, rejected = scores.chunk(2)
            return chosen - rejected, torch.ones_like(chosen)
        if "labels" in batch:
            return self.rewards(batch["input_ids"], batch["attention_mask"]), batch["labels"].float()
        raise ValueError(
            f"LitRewardModel(batch with {', '.join(sorted(batch))}): neither 'chosen' and 'rejected' nor 'labels'; "
            "use a PreferenceDataModule"
        )

    def _side_by_side(self, chosen: dict[str, Tensor], rejected: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Chosen and rejected rows in one batch: one forward, so that DDP reduces each gradient once."""
        width = max(chosen["input_ids"].shape[1], rejected["input_ids"].shape[1])

        def stack(key: str, fill: int) -> Tensor:
            return torch.cat([F.pad(s[key], (0, width - s[key].shape[1]), value=fill) for s in (chosen, rejected)])

        assert self.model is not None
        return stack("input_ids", self.model.config.pad_token_id), stack("attention_mask", 0)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean loss of a batch."""
        margins, targets = self.margins(batch)
        loss = F.binary_cross_entropy_with_logits(margins, targets)
        self.train_accuracy((margins > 0).long(), (targets > 0.5).long())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(targets))
        self.log("train/accuracy", self.train_accuracy, on_step=True, on_epoch=False, batch_size=len(targets))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Adds a batch to validation loss and accuracy."""
        margins, targets = self.margins(batch)
        self.val_loss.update(F.binary_cross_entropy_with_logits(margins, targets), weight=len(targets))
        self.val_accuracy.update((margins > 0).long(), (targets > 0.5).long())

    def on_validation_epoch_end(self) -> None:
        """Logs loss and accuracy over all validation examples of all ranks."""
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)
