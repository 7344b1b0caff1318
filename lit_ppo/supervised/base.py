"""The common base of LitSFT, LitRewardModel and LitCritic: one Hugging Face model and one optimizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_ppo.attention import autocast
from lit_ppo.data.tokenization import save_tokenizer
from lit_ppo.generation.config import named_stops
from lit_ppo.models.card import Card, add_data, hub_name, write_card
from lit_ppo.models.compute import in_bfloat16
from lit_ppo.models.export import checked_dtype, checked_repository, list_files, push, save_model
from lit_ppo.models.positions import rope_bound, row_groups, token_limit
from lit_ppo.models.pretrained import starting_dtype
from lit_ppo.models.stored import Dtype
from lit_ppo.optim.precision import (
    MatmulPrecision,
    apply_matmul_precision,
    checked_matmul_precision,
    use_bfloat16_weights,
)
from lit_ppo.optim.settings import BuiltOptimizer, build_optimizer, checked_factories, restore_settings
from lit_ppo.parallel.checkpoint_io import checked_entries
from lit_ppo.parallel.entries import check_complete, check_resumable, check_weights
from lit_ppo.parallel.files import write_checksums
from lit_ppo.parallel.full_state import full_weights
from lit_ppo.parallel.loops import use_exact_loops
from lit_ppo.parallel.ranks import n_ranks, rank
from lit_ppo.parallel.sharding import build, check_placed, shard
from lit_ppo.parallel.trainer import check_trainer
from lit_ppo.rewards.folders import check_not_read, folders_of
from lit_ppo.supervised.source import ModelSource


class SupervisedModule(L.LightningModule):
    """Trains all weights of a model and saves it in Hugging Face format. Subclasses write the steps.

    The model and the tokenizer are loaded at their first use, because a data module's ``prepare_data`` may write the
    tokenizer before that.

    Args:
        source: Loads or builds the model.
        optimizer: From parameters to optimizer.
        scheduler: From optimizer to learning-rate schedule.
        float32_matmul_precision: As of ``LitPPO``.
    """

    method: str  # for the model card, as the next two
    task: str
    objective: str

    def __init__(
        self,
        source: ModelSource,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        float32_matmul_precision: MatmulPrecision | None,
    ) -> None:
        super().__init__()
        self._matmul_precision = checked_matmul_precision(self, float32_matmul_precision)
        self._bfloat16_weights = False
        self.model: PreTrainedModel | None = None  # until configure_model
        self.source = source
        self._optimizer, self._scheduler = checked_factories(self, {"": (optimizer, scheduler)})[""]
        self._built: dict[str, BuiltOptimizer] = {}
        self._resumed: tuple[dict[str, Any], list[Any]] | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with a pad token."""
        return self.source.tokenizer

    def setup(self, stage: str) -> None:
        check_trainer(self.trainer)
        use_exact_loops(self.trainer)
        apply_matmul_precision(self, self._matmul_precision, self.trainer.strategy.root_device.type)
        self._bfloat16_weights = use_bfloat16_weights(self, self.trainer, {"optimizer": self._optimizer})

    def make_model(self) -> PreTrainedModel:
        """Load or build the model on the CPU."""
        return self.source.make()

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """Change how a model computes; it is not sharded yet."""
        return model

    def configure_model(self) -> None:
        strategy = None if self._trainer is None else self._trainer.strategy
        if self.model is None:
            model = self.prepare(autocast.use(build(strategy, self.make_model)))
            if self._bfloat16_weights:
                in_bfloat16(model)
            self.model = shard(strategy, model)
        else:
            check_placed(strategy, self)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.configure_model()  # where it has not been built: weights that come back from ranks of ddp_spawn
        return super().load_state_dict(*args, **kwargs)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        built = build_optimizer(self, "", self.parameters(), self._optimizer, self._scheduler)
        self._built = {"model": built}
        if built.schedule is None:
            return built.optimizer
        return {"optimizer": built.optimizer, "lr_scheduler": {"scheduler": built.schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        precision = self.trainer.precision_plugin
        if not isinstance(precision, MixedPrecision) or precision.scaler is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        # Lightning refuses fused optimizers in all mixed precision, but only float16 scales gradients
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        Precision.clip_gradients(precision, optimizer, gradient_clip_val or 0.0, algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizers"] = {name: built.settings for name, built in self._built.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer = self._trainer
        with checked_entries(getattr(trainer, "ckpt_path", None)):
            check_weights(checkpoint, (name for name, _ in self.named_parameters(remove_duplicate=False)))
            if trainer is not None and trainer.state.fn == "fit":
                check_complete(checkpoint, ["optimizers.model"])
                check_resumable(trainer, checkpoint, checkpoint["optimizers"])
        self._resumed = checkpoint.get("optimizers", {}), checkpoint.get("lr_schedulers", [])

    def on_train_start(self) -> None:
        if self._resumed is not None:
            restore_settings(self.trainer, self._built, *self._resumed, steps={"model": self.trainer.global_step})
            self._resumed = None

    def groups(self, attention_mask: Tensor) -> list[tuple[list[int] | slice, int]]:
        """Rows of a right-padded batch that share a forward, and its width: all rows, unless positions forbid it.

        Raises:
            ValueError: A row has more tokens than the model has positions.
        """
        assert self.model is not None
        limit, width = token_limit(self.model), attention_mask.shape[1]
        if limit is not None and width > limit:
            raise ValueError(
                f"{type(self).__name__}(model={self.source.model!r}): a text of {width} tokens exceeds its {limit} "
                "positions; lower the data's max_length"
            )
        if rope_bound(self.model) is None:
            return [(slice(None), width)]
        lengths = attention_mask.sum(1).tolist()
        return [(rows, max(lengths[row] for row in rows)) for rows in row_groups(self.model, lengths)]

    def read_rows(self, attention_mask: Tensor, read: Callable[[list[int] | slice, int], Tensor]) -> Tensor:
        """What forwards give for each row of a right-padded batch, in the order of the rows.

        Args:
            attention_mask: Of the batch.
            read: From rows that share a forward, and its width, to one entry for each of them.
        """
        groups = self.groups(attention_mask)
        found = torch.cat([read(rows, width) for rows, width in groups])
        order = torch.cat([torch.arange(len(attention_mask))[rows] for rows, _ in groups]).argsort()
        return found[order.to(found.device)]

    def mean_over_ranks(self, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a training step whose entries, such as tokens, count alike on all ranks. Collective.

        Args:
            total: Sum over this rank's entries.
            count: How many they are; 0 on a rank without any.

        Returns:
            The loss to back-propagate: averaged over ranks, its gradients are those of the mean over all entries. And
            that mean, which is equal on all ranks.
        """
        sums = torch.stack([total.detach(), count.to(total)])
        if n_ranks() > 1:
            sums = self.all_gather(sums).sum(0)  # type: ignore[union-attr]
        n = sums[1].clamp(min=1)
        return total * n_ranks() / n, sums[0] / n

    def trained_stop(self) -> int | None:
        """A stop token that training taught and that neither tokenizer nor generation config need to name."""
        return None

    def save_pretrained(
        self, dirpath: str | Path, *, dtype: Dtype | None = None, push_to_hub: str | None = None
    ) -> None:
        """Write weights, config, tokenizer and model card to a folder; for a causal LM, also the generation config.

        The generation config is that of the checkpoint, with the tokenizer's end-of-sequence token, which training
        appended to every text, as the first stop token. Call it on every rank if the strategy shards. Rank 0 writes.

        Args:
            dirpath: Folder; it is created if it does not exist.
            dtype: Of the weights; None: that of the checkpoint, unless ``model_kwargs`` name one for training.
            push_to_hub: Then push the folder to this repository, such as ``me/my-model``.

        Raises:
            ValueError: The folder is a file, or the module reads it; or it is not a dtype, or not the name of a
                repository.
            RuntimeError: The folder is written, but cannot be pushed.
        """
        given, repository = checked_dtype("save_pretrained", dtype), checked_repository("save_pretrained", push_to_hub)
        check_not_read(f"save_pretrained({str(dirpath)!r})", dirpath, folders_of(self))
        self.configure_model()
        assert self.model is not None
        weights = full_weights(self.model)
        if weights is None or rank() == 0:
            own = self.model.dtype if self.source.names_dtype else starting_dtype(self.model)
            written = own if given is None else getattr(torch, given)
            writes_text = self.model.can_generate()
            stops = named_stops(self.model, self.tokenizer, self.trained_stop()) if writes_text else None
            save_model(self.model, weights, dirpath, dtype=written, stops=stops)
            save_tokenizer(self.tokenizer, dirpath, keep_pad=not writes_text)
            write_card(dirpath, add_data(self.card(), self._trainer))
            write_checksums(Path(dirpath))
            list_files(dirpath)
            if repository is not None and rank() == 0:
                push(f"save_pretrained(push_to_hub={repository!r})", dirpath, repository)

    def card(self) -> Card:
        """What the model card of an export says about the module."""
        start = self.source.model
        scratch = start if isinstance(start, dict) else {}
        settings = ", ".join(f"{name}: {value}" for name, value in scratch.items())
        base = None if isinstance(start, dict) else start
        return {
            "method": self.method,
            "task": self.task,
            "base": base,
            "base_model": hub_name(base),
            "rows": {"base": f"`{base}`" if base else f"none, a new model: {settings}", "objective": self.objective},
        }
