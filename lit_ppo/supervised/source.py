"""Load a Hugging Face model and its tokenizer, or build the model from scratch."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_ppo.data.tokenization import loads_the_same
from lit_ppo.models.pretrained import (
    check_causal_lm,
    check_complete,
    check_not_quantized,
    load_pretrained,
    n_outputs,
    tokenizer_path,
)
from lit_ppo.models.stored import checked_model_kwargs
from lit_ppo.shown import first_line, reason
from lit_ppo.validate import mapping, path_or_name, refuse, text

T = TypeVar("T")


class ModelSource:
    """Where a supervised module gets its model and tokenizer. Nothing is loaded before the first use.

    Args:
        owner: The module's class, for messages.
        auto_class: Class of transformers that loads or builds the model.
        model: Folder or hub name of a checkpoint, or the settings of a new model.
        tokenizer: Folder or hub name; None uses the model's.
        model_kwargs: More arguments of ``from_pretrained`` or ``from_config``.
        **config: Settings that override those of the checkpoint or the new model.

    Raises:
        ValueError: A new model has no ``model_type`` or no tokenizer.
    """

    def __init__(
        self,
        owner: str,
        auto_class: Any,
        model: str | dict[str, Any],
        tokenizer: str | None,
        model_kwargs: dict[str, Any] | None,
        **config: Any,
    ) -> None:
        model = mapping(owner, "model", model) if isinstance(model, Mapping) else path_or_name(owner, "model", model)
        tokenizer = None if tokenizer is None else path_or_name(owner, "tokenizer", tokenizer)
        if isinstance(model, dict) and "model_type" not in model:
            refuse(owner, "model", model, "no model_type; name one, such as 'llama' or 'gpt2'")
        if isinstance(model, dict) and text(owner, "model.model_type", model["model_type"]) not in CONFIG_MAPPING:
            refuse(
                owner, "model.model_type", model["model_type"], "transformers has no such type; give one, as 'llama'"
            )
        if isinstance(model, dict) and tokenizer is None:
            refuse(owner, "tokenizer", None, "a model from scratch has no tokenizer; name a tokenizer's folder")
        self.owner, self.auto_class, self.model, self.config = owner, auto_class, model, config
        self.tokenizer_path = tokenizer if tokenizer is not None else str(model)
        given = checked_model_kwargs(owner, model_kwargs, *config)
        self.model_kwargs = {"dtype": torch.float32} | given
        self.names_dtype = not {"dtype", "torch_dtype"}.isdisjoint(given)
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; if it has no pad token, it pads with its end-of-sequence token."""
        if self._tokenizer is None:
            trust = bool(self.model_kwargs.get("trust_remote_code"))
            path = self.tokenizer_path
            tokenizer: PreTrainedTokenizerBase = self.load(
                "tokenizer", path,
                lambda: AutoTokenizer.from_pretrained(tokenizer_path(path), trust_remote_code=trust),
            )  # fmt: skip
            if tokenizer.pad_token is None and tokenizer.eos_token is None:
                problem = "it has no pad token and no end-of-sequence token; set pad_token and save it again"
                refuse(self.owner, "tokenizer", self.tokenizer_path, problem)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            self._tokenizer = tokenizer
        return self._tokenizer

    def load(self, argument: str, path: str, function: Callable[[], T]) -> T:
        """What a function loads, with an error that names the module's argument."""
        try:
            return function()
        except OSError as error:  # transformers raises it for a missing folder, a missing file and an unknown hub name
            raise ValueError(
                f"{self.owner}({argument}={path!r}): cannot be loaded from a folder or from the hub "
                f"({first_line(error)}); check the path or name"
            ) from error
        except ValueError as error:
            if "contains custom code" in str(error):
                problem = "comes with its own code; if you trust it, set model_kwargs: {trust_remote_code: true}"
                raise ValueError(f"{self.owner}({argument}={path!r}): {problem}") from error
            raise ValueError(f"{self.owner}({argument}={path!r}): {first_line(error)}") from error

    def check_one_output(self, kind: str) -> None:
        """Check that the head of a classifier's checkpoint, if it has one, has one output.

        Args:
            kind: What is trained, for the message.

        Raises:
            ValueError: It has several, and ``model_kwargs`` do not ask for a new head.
        """
        if isinstance(self.model, dict) or self.model_kwargs.get("ignore_mismatched_sizes"):
            return
        outputs = self.load("model", self.model, partial(n_outputs, self.model, self.model_kwargs))
        if outputs not in (None, 1):
            problem = (
                f"its head has {outputs} outputs, but {kind} has 1; to train a new head, add "
                "model_kwargs={'ignore_mismatched_sizes': True}"
            )
            refuse(self.owner, "model", self.model, problem)

    def _from_checkpoint(self, path: str) -> PreTrainedModel:
        def load() -> tuple[PreTrainedModel, list[str]]:
            return load_pretrained(self.auto_class, path, **self.config, **self.model_kwargs)

        model, missing = self.load("model", path, load)
        where = f"{self.owner}(model={path!r})"
        check_not_quantized(where, model, "give a model in full precision")
        if self.auto_class is AutoModelForCausalLM:
            check_causal_lm(where, model, missing)
        else:
            backbone, pooler = f"{model.base_model_prefix}.", f"{model.base_model_prefix}.pooler."
            head = {name for name in missing if not name.startswith(backbone) or name.startswith(pooler)}
            check_complete(where, model, missing, may_be_new=tuple(head))
        return model

    def make(self) -> PreTrainedModel:
        """The model in training mode; new weights depend only on the seed that Lightning was given."""
        with torch.random.fork_rng():
            torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)))
            if isinstance(self.model, dict):
                model = self._from_scratch(self.model)
            else:
                model = self._from_checkpoint(self.model)
        embedded = len(model.get_input_embeddings().weight)
        if len(self.tokenizer) > embedded:
            problem = f"{len(self.tokenizer)} tokens, but the model embeds {embedded}; use the model's own tokenizer"
            refuse(self.owner, "tokenizer", self.tokenizer_path, problem)
        if self.auto_class is not AutoModelForCausalLM:  # a classifier needs it to find a text's last token
            model.config.pad_token_id = self.tokenizer.pad_token_id
        model.train()  # loaded models are in evaluation mode, and Lightning does not change that
        return model  # type: ignore[no-any-return]

    def _from_scratch(self, settings: dict[str, Any]) -> Any:
        tokenizer = self.tokenizer
        special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
        with self._naming("model", settings):
            config = AutoConfig.for_model(**{"vocab_size": len(tokenizer)} | special | settings | self.config)
        if not loads_the_same(tokenizer, config):
            problem = (
                f"transformers loads a {config.model_type} checkpoint with a tokenizer class of its own, which splits "
                f"text differently from {self.tokenizer_path!r}; use another model_type, such as llama"
            )
            refuse(self.owner, "model", settings, problem)
        named = ("model_kwargs", self.model_kwargs) if len(self.model_kwargs) > 1 else ("model", settings)
        with self._naming(*named):
            return self.auto_class.from_config(config, **self.model_kwargs)

    @contextmanager
    def _naming(self, argument: str, value: Any) -> Iterator[None]:
        """Errors of transformers name the argument that they are about."""
        try:
            yield
        except Exception as error:
            refuse(self.owner, argument, value, f"{reason(error)}; correct it")
