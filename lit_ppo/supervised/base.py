"""What the two supervised modules share: a Hugging Face model, its tokenizer, and one optimizer."""

import os
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lit_ppo.data.tokenization import loads_the_same, save_tokenizer
from lit_ppo.optim.schedules import per_step
from lit_ppo.optim.settings import BuiltOptimizer, restore_settings
from lit_ppo.parallel.bf16 import warn_if_slower
from lit_ppo.parallel.full_state import full_weights
from lit_ppo.parallel.ranks import rank
from lit_ppo.parallel.sharding import build, check_placed, shard
from lit_ppo.parallel.strategies import refuse_fsdp1


class SupervisedModule(L.LightningModule):
    """Loads or builds a model, optimizes all of its weights, and saves it in Hugging Face format.

    Model and tokenizer are loaded at first use, not in the constructor: a data module's ``prepare_data`` may have to
    write the tokenizer first. Subclasses name the ``auto_class`` and write the steps.
    """

    auto_class: ClassVar[Any]
    config_overrides: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        model: str | dict[str, Any],
        tokenizer: str | None,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        model_kwargs: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if isinstance(model, dict) and "model_type" not in model:
            raise ValueError(f"{name}(model={model}): no model_type; name one, such as 'llama' or 'gpt2'")
        if isinstance(model, dict) and tokenizer is None:
            raise ValueError(f"{name}(tokenizer=None): a model from scratch has none of its own; name its folder")
        self.model: PreTrainedModel | None = None  # until configure_model
        self._source = model
        self._tokenizer_source = tokenizer if tokenizer is not None else str(model)
        self._model_kwargs = {"dtype": torch.float32} | dict(model_kwargs or {})
        self._optimizer, self._scheduler = optimizer, scheduler
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._built: dict[str, BuiltOptimizer] = {}
        self._resumed: tuple[dict[str, Any], list[Any]] | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with a pad token (its end-of-text token where it has none of its own)."""
        if self._tokenizer is None:
            trust = bool(self._model_kwargs.get("trust_remote_code"))
            tokenizer = load(self, "tokenizer", AutoTokenizer, self._tokenizer_source, trust_remote_code=trust)
            if tokenizer.pad_token is None and tokenizer.eos_token is None:
                raise ValueError(
                    f"{type(self).__name__}(tokenizer={self._tokenizer_source!r}): it has neither a pad nor an "
                    "end-of-text token; set pad_token and save it again"
                )
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            self._tokenizer = tokenizer
        return self._tokenizer

    def setup(self, stage: str) -> None:
        refuse_fsdp1(self.trainer.strategy)

    def configure_model(self) -> None:
        """Load the model, or build it with weights that depend on the seed alone."""
        strategy = None if self._trainer is None else self._trainer.strategy
        if self.model is None:
            self.model = shard(strategy, build(strategy, self._make))
        else:
            check_placed(strategy, self)

    def _make(self) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)))
            model = self._from_scratch() if isinstance(self._source, dict) else self._from_pretrained(self._source)
        self._check_vocabulary(model)
        model.config.pad_token_id = self.tokenizer.pad_token_id  # by it a classifier finds a text's last token
        model.train()  # loaded models come in eval mode, and Lightning leaves them so
        return model

    def _from_scratch(self) -> PreTrainedModel:
        tokenizer = self.tokenizer
        settings = dict(self._source) | self.config_overrides  # type: ignore[arg-type]
        special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
        config = AutoConfig.for_model(**{"vocab_size": len(tokenizer)} | special | settings)
        if not loads_the_same(tokenizer, config):
            raise ValueError(
                f"{type(self).__name__}(model={self._source}): transformers would load from a "
                f"{config.model_type} checkpoint a tokenizer class of its own, which splits text differently from "
                f"{self._tokenizer_source!r}; use another model_type, such as llama"
            )
        model: PreTrainedModel = self.auto_class.from_config(config, **self._model_kwargs)
        return model

    def _from_pretrained(self, path: str) -> PreTrainedModel:
        model: PreTrainedModel = load(
            self, "model", self.auto_class, path, **self.config_overrides, **self._model_kwargs
        )
        return model

    def _check_vocabulary(self, model: PreTrainedModel) -> None:
        embedded = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
        if len(self.tokenizer) > embedded:
            raise ValueError(
                f"{type(self).__name__}(tokenizer={self._tokenizer_source!r}): it has {len(self.tokenizer)} tokens "
                f"and the model embeds {embedded}; use the model's own tokenizer"
            )

    def on_fit_start(self) -> None:
        """Say so where bf16 was asked for and is slower."""
        warn_if_slower(self.trainer.precision, self.device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over all weights; the scheduler steps once per optimizer step."""
        scheduler_of, name = self._scheduler, type(self).__name__

        def schedule(optimizer: Optimizer) -> Any:
            assert scheduler_of is not None
            return per_step(f"{name}(scheduler", scheduler_of(optimizer), self)

        built = BuiltOptimizer(
            f"{name}(optimizer", self._optimizer(self.parameters()), schedule if scheduler_of is not None else None
        )
        self._built = {"model": built}
        if built.schedule is None:
            return built.optimizer
        return {"optimizer": built.optimizer, "lr_scheduler": {"scheduler": built.schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the optimizer was made with."""
        checkpoint["optimizers"] = {name: built.settings for name, built in self._built.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what it was made with until training starts."""
        self._resumed = checkpoint.get("optimizers", {}), checkpoint.get("lr_schedulers", [])

    def on_train_start(self) -> None:
        """Have the rate and schedule that a resumed run was given take effect."""
        if self._resumed is not None:
            restore_settings(self.trainer, self._built, *self._resumed, steps=self.trainer.global_step)
            self._resumed = None

    def save_pretrained(self, dirpath: str | Path) -> None:
        """Write weights, config and tokenizer (for causal LMs also the generation config) to a folder.

        To be called on every rank where the strategy shards; the first one writes.

        Args:
            dirpath: Folder to write; created if it is not there.
        """
        self.configure_model()
        assert self.model is not None
        weights = full_weights(self.model)
        if weights is None or rank() == 0:
            self.model.save_pretrained(str(dirpath), state_dict=weights)
            save_tokenizer(self.tokenizer, dirpath)


def load(module: SupervisedModule, argument: str, auto_class: Any, source: str, **kwargs: Any) -> Any:
    """``from_pretrained``, with an error that names the module's argument."""
    try:
        return auto_class.from_pretrained(source, **{"trust_remote_code": False, **kwargs})
    except OSError as error:  # what transformers raises for a missing folder, a missing file, an unknown hub name
        raise ValueError(
            f"{type(module).__name__}({argument}={source!r}): cannot be loaded, neither as a folder nor from the hub "
            f"({str(error).splitlines()[0]}); check the path or name"
        ) from error
