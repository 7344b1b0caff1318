"""Train a reward model on pairs of texts or on labelled texts."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lit_ppo.constructor import constructor
from lit_ppo.models.compute import score_in_float32
from lit_ppo.optim.precision import MatmulPrecision
from lit_ppo.supervised.base import SupervisedModule
from lit_ppo.supervised.source import ModelSource
from lit_ppo.validate import boolean, refuse


class LitRewardModel(SupervisedModule):
    """Trains a sequence classifier with one output, the reward, on preferences or on labels.

    The loss of a pair is the Bradley-Terry loss ``-log sigmoid(r_chosen - r_rejected)``. The loss of a labelled text
    is the binary cross-entropy of ``sigmoid(r)``. A pair is correct if the chosen text has the higher score, a
    labelled text if its score is positive for label 1 and negative for label 0. Accumulated batches
    (``accumulate_grad_batches``) count alike, also an epoch's last, which may have fewer pairs or texts.

    Args:
        model: Folder or hub name of a checkpoint, or the settings of a new model, such as
            ``{model_type: llama, hidden_size: 192, ...}``. The checkpoint of a causal LM gets a new head.
        tokenizer: Folder or hub name; None uses the model's.
        optimizer: From parameters to optimizer.
        scheduler: From optimizer to learning-rate schedule, one step per optimizer step.
        model_kwargs: More arguments of ``from_pretrained`` (for a new model, of ``from_config``), such as
            ``{attn_implementation: eager}``.
        append_eos: Append the end-of-sequence token to every text that does not end with it. The exported config says
            so, and ``RewardModel`` then does the same with responses that ended.
        float32_matmul_precision: ``"highest"``, ``"high"`` (TF32) or ``"medium"``. None: on CUDA ``"high"``.

    Reads batches of ``chosen`` and ``rejected``, each with ``input_ids`` and ``attention_mask``; or of ``input_ids``,
    ``attention_mask`` and ``labels`` (0 or 1, or a probability). In validation, rows of ``weight`` 0 do not count.
    Logs ``train/loss``, ``train/accuracy``, ``val/loss`` and ``val/accuracy``, over the rows of all ranks.
    Source: Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, section 3.5.

    Raises:
        ValueError: A new model has no ``model_type`` or no tokenizer; or, when the model is loaded, its head has
            several outputs.
    """

    method, task = "reward model", "text-classification"
    objective = "the better text of a pair (Bradley-Terry), or labels; the one output is the reward"

    @constructor
    def __init__(
        self,
        model: str | dict[str, Any],
        tokenizer: str | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        model_kwargs: dict[str, Any] | None = None,
        append_eos: bool = False,
        float32_matmul_precision: MatmulPrecision | None = None,
    ) -> None:
        source = ModelSource(
            type(self).__name__, AutoModelForSequenceClassification, model, tokenizer, model_kwargs, num_labels=1
        )
        super().__init__(source, optimizer, scheduler, float32_matmul_precision)
        self.append_eos = boolean(self, "append_eos", append_eos)
        self.val_loss, self.val_accuracy = MeanMetric(), MeanMetric()

    def make_model(self) -> PreTrainedModel:
        self.source.check_one_output("a reward model")
        model = super().make_model()
        model.config.append_eos = self.append_eos
        if self.append_eos and self.tokenizer.eos_token_id in (None, model.config.pad_token_id):
            problem = "the tokenizer needs an end-of-sequence token that it does not also pad with"
            refuse(self, "append_eos", True, f"{problem}: the model scores the last token that is no padding")
        return model

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        return score_in_float32(model)  # type: ignore[no-any-return]

    def rewards(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores of a batch of right-padded texts, of shape (B,)."""
        if self.append_eos:
            assert self.model is not None
            eos, pad = int(self.tokenizer.eos_token_id), int(self.model.config.pad_token_id)
            input_ids, attention_mask = with_eos(input_ids, attention_mask, eos, pad)

        def read(rows: list[int] | slice, width: int) -> Tensor:
            assert self.model is not None
            inputs = {"input_ids": input_ids[rows, :width], "attention_mask": attention_mask[rows, :width]}
            logits: Tensor = self.model(**inputs).logits
            return logits

        return self.read_rows(attention_mask, read).squeeze(-1).float()

    def margins(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits and their targets: a logit should be positive if its target is 1."""
        if "chosen" in batch:
            scores = self.rewards(*self._side_by_side(batch["chosen"], batch["rejected"]))
            chosen, rejected = scores.chunk(2)
            return chosen - rejected, torch.ones_like(chosen)
        if "labels" in batch:
            return self.rewards(batch["input_ids"], batch["attention_mask"]), batch["labels"].float()
        raise ValueError(
            f"LitRewardModel(batch with {', '.join(sorted(batch))}): needs 'chosen' and 'rejected', or 'labels'; use a "
            "PreferenceDataModule"
        )

    def _side_by_side(self, chosen: dict[str, Tensor], rejected: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Chosen and rejected texts in one batch, for one forward, so that DDP reduces each gradient once."""
        width = max(chosen["input_ids"].shape[1], rejected["input_ids"].shape[1])

        def stack(key: str, fill: int) -> Tensor:
            return torch.cat([F.pad(s[key], (0, width - s[key].shape[1]), value=fill) for s in (chosen, rejected)])

        assert self.model is not None
        return stack("input_ids", self.model.config.pad_token_id), stack("attention_mask", 0)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        margins, targets = self.margins(batch)
        one = margins.new_ones(())  # a share of each rank, since all have equally many rows
        loss, mean = self.mean_over_ranks(F.binary_cross_entropy_with_logits(margins, targets), one)
        _, accuracy = self.mean_over_ranks(_correct(margins, targets).mean(), one)
        self.log("train/loss", mean, prog_bar=True, batch_size=len(targets))
        self.log("train/accuracy", accuracy, batch_size=len(targets))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        margins, targets = self.margins(batch)
        weight = batch.get("weight", 1.0)
        self.val_loss.update(F.binary_cross_entropy_with_logits(margins, targets, reduction="none"), weight)
        self.val_accuracy.update(_correct(margins, targets), weight)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)


def _correct(margins: Tensor, targets: Tensor) -> Tensor:
    """Whether logits have the sign that their targets ask for, 1 or 0."""
    return ((margins > 0) == (targets > 0.5)).float()


def with_eos(input_ids: Tensor, attention_mask: Tensor, eos: int, pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded texts with the end-of-sequence token appended where it is not the last token.

    The rest is padding, since a model scores the last token that is none.

    >>> ids, mask = with_eos(torch.tensor([[5, 6], [7, 3]]), torch.tensor([[1, 1], [1, 0]]), eos=2, pad=3)
    >>> ids.tolist(), mask.tolist()
    ([[5, 6, 2], [7, 2, 3]], [[1, 1, 1], [1, 1, 0]])
    """
    ids, mask = F.pad(input_ids, (0, 1), value=pad), F.pad(attention_mask, (0, 1))
    length = attention_mask.sum(1, keepdim=True)
    lacks = ids.gather(1, (length - 1).clamp(min=0)) != eos
    ids = ids.scatter(1, length, torch.where(lacks, eos, ids.gather(1, length)))
    return ids, mask.scatter(1, length, lacks.to(mask.dtype))
