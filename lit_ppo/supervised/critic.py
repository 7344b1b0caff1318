"""Train a critic on plain text, before PPO."""

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import CatMetric, MeanMetric
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lit_ppo.constructor import constructor
from lit_ppo.device import exact_products
from lit_ppo.models.card import Card
from lit_ppo.models.compute import score_in_float32, token_scores
from lit_ppo.models.family import check_causal
from lit_ppo.models.stored import FROZEN_MODELS, check_same_files
from lit_ppo.optim.precision import MatmulPrecision
from lit_ppo.parallel.checkpoint_io import checked_entries
from lit_ppo.parallel.entries import check_complete
from lit_ppo.parallel.ranks import gather_shares
from lit_ppo.rewards import Rewards, ScoreSource, as_source, check_columns, described, stored_models
from lit_ppo.shown import message_of
from lit_ppo.supervised.base import SupervisedModule
from lit_ppo.supervised.source import ModelSource
from lit_ppo.supervised.text_reward import TextReward
from lit_ppo.validate import integer, refuse

BATCHES_TRIED = 16  # without a text that is long enough, until training is refused


class LitCritic(SupervisedModule):
    """Trains a critic to predict the reward of text that is already there; nothing is sampled.

    Each text is read as a prompt and a response, its last ``response_tokens`` tokens. The reward scores the response
    once, and the critic predicts that score before each token of the response. The loss is the mean squared error over
    these places. Texts without a prompt, of at most ``response_tokens`` tokens, do not count. Accumulated batches
    (``accumulate_grad_batches``) count alike, however many texts of each count; a batch without any has the loss 0.

    Use it before ``LitPPO(critic="folder")`` when early updates suffer from a critic that has not learned yet, or with
    ``LeastSquaresCritic``, which reads the critic's hidden states. The text should be like the policy's responses, such
    as the text of its supervised fine-tuning. It costs one score a text, and the time of training a reward model on as
    many tokens.

    Args:
        model: Folder or hub name of a reward model with one output, whose head becomes the value head; or of a causal
            LM, which gets a new head; or the settings of a new model, such as ``{model_type: llama, ...}``.
        rewards: The reward of the later PPO run; see ``LitPPO``. Text has no columns that it could read.
        response_tokens: Tokens of a response, such as the later run's ``max_new_tokens``.
        tokenizer: Folder or hub name; None uses the model's.
        optimizer: From parameters to optimizer.
        scheduler: From optimizer to learning-rate schedule, one step per optimizer step.
        model_kwargs: More arguments of ``from_pretrained`` (for a new model, of ``from_config``), such as
            ``{attn_implementation: eager}``.
        float32_matmul_precision: ``"highest"``, ``"high"`` (TF32) or ``"medium"``. None: on CUDA ``"high"``.

    Reads batches of ``input_ids`` and ``attention_mask``, padded on the right; rows of ``weight`` 0 do not count. Logs
    ``train/loss`` and ``val/loss``; ``train/explained_variance`` and ``val/explained_variance``: 1 minus the loss over
    the variance of the scores, of the first rank's batch and of all validation texts. The exported config has
    ``response_tokens``; ``LitPPO`` warns if its responses have another length.
    Source: this project, measured in docs/explanation/regression.md; Yuan et al. 2025, arXiv:2503.01491 (value
    pretraining).

    Raises:
        ValueError: An argument is wrong; when the model is loaded, its head has several outputs, or it is no causal
            model; in training, no text is longer than ``response_tokens``.
    """

    method, task = "critic", "text-classification"
    objective = "the reward of a text's last tokens, predicted before each of them (squared error)"

    @constructor
    def __init__(
        self,
        model: str | dict[str, Any],
        rewards: Rewards,
        response_tokens: int,
        tokenizer: str | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True),
        scheduler: LRSchedulerCallable | None = None,
        model_kwargs: dict[str, Any] | None = None,
        float32_matmul_precision: MatmulPrecision | None = None,
    ) -> None:
        source = ModelSource(
            type(self).__name__, AutoModelForSequenceClassification, model, tokenizer, model_kwargs, num_labels=1
        )
        super().__init__(source, optimizer, scheduler, float32_matmul_precision)
        self.response_tokens = integer(self, "response_tokens", response_tokens)
        self.text_reward = TextReward(as_source(rewards, self), self.response_tokens)
        try:
            check_columns([], self.rewards)
        except TypeError as error:
            problem = f"{message_of(error)}; text has no columns, so give a function that needs none"
            refuse(self, "rewards", rewards, problem)
        self.val_loss, self.val_scores = MeanMetric(), CatMetric()
        self._idle: int | None = 0  # batches in which no text counted, until one does

    @property
    def rewards(self) -> ScoreSource:
        """The score source."""
        return self.text_reward.source

    def make_model(self) -> PreTrainedModel:
        self.source.check_one_output("a critic")
        model: Any = super().make_model()
        model.eval()  # with dropout, states would seem to depend on later tokens
        with exact_products(), torch.no_grad():
            try:
                check_causal(model.base_model)
            except ValueError as error:
                refuse(self, "model", self.source.model, message_of(error))
            if token_scores(model, input_ids=torch.tensor([[0, 1]]))[1] is None:
                problem = f"{type(model).__name__} does not score every token; give a model whose head does"
                refuse(self, "model", self.source.model, problem)
        model.train()
        model.config.response_tokens = self.response_tokens
        return model  # type: ignore[no-any-return]

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        return score_in_float32(model)  # type: ignore[no-any-return]

    def configure_model(self) -> None:
        super().configure_model()
        self.text_reward.build(None if self._trainer is None else self._trainer.strategy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[FROZEN_MODELS] = stored_models("rewards", self.rewards)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == "fit":
            path, now = self._trainer.ckpt_path, stored_models("rewards", self.rewards)
            with checked_entries(path):
                check_complete(checkpoint, [FROZEN_MODELS])
            gather_shares(lambda: check_same_files(self, path, checkpoint[FROZEN_MODELS], now))

    def values(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values before each of the last ``response_tokens`` tokens of right-padded texts.

        Shapes:
            (B, L), (B, L) -> (B, T), float32; any numbers where a text has at most T tokens.
        """
        steps = torch.arange(self.response_tokens, device=input_ids.device) - self.response_tokens - 1

        def read(rows: list[int] | slice, width: int) -> Tensor:
            ids, mask = input_ids[rows, :width], attention_mask[rows, :width]
            pooled, scores = token_scores(self.model, input_ids=ids, attention_mask=mask, use_cache=False)
            assert scores is not None
            before = (mask.sum(1, keepdim=True) + steps).clamp(min=0)
            # a sharded model gathers its outer weights again once gradients reach what its forward returned
            return scores.squeeze(-1).gather(1, before).float() + 0.0 * pooled.float()

        return self.read_rows(attention_mask, read)

    def squared_errors(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum of squared errors over the places of the texts that count, and these texts' scores."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        lengths = mask.sum(1).tolist()
        weights = batch["weight"].tolist() if "weight" in batch else [1] * len(lengths)
        counted = [row for row, length in enumerate(lengths) if length > self.response_tokens and weights[row]]
        scores = self.text_reward(self.tokenizer, [ids[row, : lengths[row]].tolist() for row in counted], self.device)
        errors = self.values(ids, mask)[counted] - scores[:, None]
        return errors.square().sum(), scores

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean squared error over the places of the texts that count, and these texts' scores."""
        total, scores = self.squared_errors(batch)
        return total / max(1, len(scores) * self.response_tokens), scores

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        total, scores = self.squared_errors(batch)
        places = len(scores) * self.response_tokens
        loss, mean = self.mean_over_ranks(total, total.new_full((), places))
        if self._idle is not None:  # all ranks decide alike
            counts: Any = self.all_gather(torch.tensor(len(scores), device=self.device))
            self._idle = None if counts.sum() else self._idle + 1
            if self._idle == BATCHES_TRIED:
                self._refuse_length("training")
        explained = explained_variance(total.detach() / max(1, places), scores)
        self.log("train/loss", mean, prog_bar=True, batch_size=len(batch["input_ids"]))
        self.log("train/explained_variance", explained, batch_size=len(batch["input_ids"]))
        return loss

    def on_train_epoch_end(self) -> None:
        if self._idle:
            self._refuse_length("training")

    def card(self) -> Card:
        card = super().card()
        read = f"{described(self.rewards)}, of the last {self.response_tokens} tokens"
        return {**card, "rows": {**card["rows"], "reward": read}}

    def _refuse_length(self, kind: str) -> None:
        problem = f"no {kind} text is longer, which leaves no prompt; lower it, or raise the data's max_length"
        refuse(self, "response_tokens", self.response_tokens, problem)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss, scores = self.loss(batch)
        self.val_loss.update(loss, weight=len(scores))
        self.val_scores.update(scores)

    def on_validation_epoch_end(self) -> None:
        scores = torch.as_tensor(self.val_scores.compute()).flatten()
        self.val_scores.reset()  # Lightning resets those that are logged
        if len(scores):
            explained = explained_variance(self.val_loss.compute(), scores)
            self.log("val/loss", self.val_loss, prog_bar=True)
            self.log("val/explained_variance", explained, prog_bar=True, sync_dist=True)  # equal on all ranks
        elif not self.trainer.sanity_checking:  # which sees a few batches
            self._refuse_length("validation")


def explained_variance(error: Tensor, scores: Tensor) -> Tensor:
    """1 minus a mean squared error over the variance of the scores; 0 where they are all alike.

    >>> explained_variance(torch.tensor(1.0), torch.tensor([1.0, 5.0])).item()
    0.75
    """
    variance = scores.var(correction=0) if len(scores) else torch.zeros_like(error)
    return torch.where(variance > 0, 1.0 - error / variance, 0.0)
