"""Prompts for PPO: every rank gets the same batches, in an order that a resumed run continues."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lit_ppo.constructor import constructor
from lit_ppo.data.batch import (
    HeldOutPrompts,
    PromptBatch,
    PromptOrder,
    PromptTable,
    ResumableLoader,
    TrainingPrompts,
    checked_weights,
)
from lit_ppo.data.encoding import encode_prompts
from lit_ppo.data.module import TableDataModule, check_identity
from lit_ppo.data.objects import Data, checked_data
from lit_ppo.data.table import ROW_MB, Table
from lit_ppo.validate import integer_or_none, refuse, text

MOST_VALUES = 2**28  # every row has a value for each column, at least None


class PromptDataModule(TableDataModule):
    """Prompts for sampling: plain text, or chat messages where the column has lists of them.

    Each batch is a :class:`~lit_ppo.data.batch.PromptBatch` with the prompts of all ranks, the same on every rank.
    Every epoch is shuffled; batch number ``u`` depends only on the seed and ``u``, and a resumed run continues with
    the next batch. Held-out prompts keep the order of the file.

    Args:
        path: Training file or hub data set, see :func:`lit_ppo.data.files.read_table`; or the rows themselves: a
            ``datasets.Dataset``, a list of rows or of prompts, a mapping of columns, a ``DataFrame``, a stream.
        prompt_column: Column with the prompt.
        val_path: Validation file or rows.
        val_fraction: Fraction of the training file to hold out instead, see :meth:`lit_ppo.data.table.Table.split`.
        split_column: Column whose value decides which rows are held out; None: the prompt.
        test_path: File or rows for ``trainer.test``.
        predict_path: File or rows for ``trainer.predict``.
        batch_size: Prompts per update, over all ranks.
        max_prompt_length: Longer prompts lose tokens from the left (a warning counts them); None: no limit.
        lower_case: Lower-case prompts, but not other columns.
        column_names: Columns of a CSV or TSV file without a header.
        tokenizer: Tokenizer, or its path or hub name; None: that of the module being trained.
        data_root: Folder of relative data paths; None: the working directory.
        seed: Seed of the order; None: that of ``seed_everything``.
        max_rows: Read at most this many rows of each file or data set; required for a stream, which has no length.
        chat_template_kwargs: Variables of the chat template, such as ``{enable_thinking: false}``.
        max_row_mb: A longer row, in MiB, is refused, and so is a file or data set whose rows take more than 256 times
            as much (4 GiB): unpacked, with 512 bytes for each row.
    """

    column_of_text = "prompt_column"
    follows_updates = True  # a checkpoint without its state resumes at the update that the loops count

    @constructor
    def __init__(
        self,
        path: Data,
        *,
        prompt_column: str = "prompt",
        val_path: Data | None = None,
        val_fraction: float = 0.0,
        split_column: str | None = None,
        test_path: Data | None = None,
        predict_path: Data | None = None,
        batch_size: int = 64,
        max_prompt_length: int | None = None,
        lower_case: bool = False,
        column_names: list[str] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        data_root: str | None = None,
        seed: int | None = None,
        max_rows: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_row_mb: float = ROW_MB,
    ) -> None:
        super().__init__(
            path, val_path, val_fraction, split_column, batch_size, lower_case, column_names, tokenizer, data_root,
            seed, max_rows, chat_template_kwargs, max_row_mb,
        )  # fmt: skip
        self.prompt_column = text(self, "prompt_column", prompt_column)
        self.test_path = None if test_path is None else checked_data(self, "test_path", test_path)
        self.predict_path = None if predict_path is None else checked_data(self, "predict_path", predict_path)
        self.max_prompt_length = integer_or_none(self, "max_prompt_length", max_prompt_length, at_least=2)
        self._tables: dict[str, PromptTable] = {}
        self._validates = False  # rather than fits
        self._weights: np.ndarray | None = None
        self._training: TrainingPrompts | None = None

    def setup(self, stage: str) -> None:
        """Read and tokenise the prompts of the stage, if there are any.

        After a ``fit`` Lightning also calls this where a loader of the user's own is tested or predicted on.

        Raises:
            ValueError: A file is wrong.
        """
        super().setup(stage)
        stage = str(getattr(stage, "value", stage))  # Lightning passes an enum
        self._validates = stage == "validate"
        if stage in ("fit", "validate"):
            self._setup_split(stage)
        elif getattr(self, f"{stage}_path") is not None:
            self._tables[stage] = self._encode(self.read(f"{stage}_path"))

    def _setup_split(self, stage: str) -> None:
        if stage == "validate" and not self.val_fraction and self.val_path is None:
            return
        train, val = self.read_split(lambda table: [self.prompt_column])
        if val is not None:
            self._tables["val"] = self._encode(val)
        if stage == "fit":
            table = self._tables["train"] = self._encode(train)
            order = PromptOrder(len(table), self.batch_size, self.seed)
            if self._weights is not None:  # set before this call of fit
                order.weights = checked_weights(f"{type(self).__name__}.set_weights", self._weights, len(table))
            self._training = TrainingPrompts(table, order, self._batches_trained() or 0)

    def _encode(self, table: Table) -> PromptTable:
        column = self.prompt_column
        chat = table.is_chat(0, column)
        prompts = [self.text_or_chat(table, i, column) for i in range(len(table))]
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, list) != chat:
                table.refuse(i, "plain and chat prompts are mixed; use one kind")
        if len(table.columns) * len(table) > MOST_VALUES:
            problem = f"{table.source} has {len(table.columns)} different columns in {len(table)} rows"
            raise ValueError(f"{table.where}: {problem}; write what differs from row to row as values, not as names")
        columns = {name: [row.get(name) for row in table.rows] for name in table.columns if name != column}
        if not chat and columns.pop("messages", None) is not None:
            warnings.warn(
                f"{table.where}: the column 'messages' is left out, since rewards expect chat prompts under this name; "
                "train on it with prompt_column='messages', or rename it",
                stacklevel=2,
            )
        if chat and "messages" in columns:
            raise ValueError(
                f"{table.where}: chat prompts are passed on as 'messages', but another column has this name; rename it"
            )
        texts, ids = encode_prompts(
            self.load_tokenizer(), prompts, self.max_prompt_length, type(self).__name__, "max_prompt_length",
            self.template_options(table) if chat else None, table.place,
        )  # fmt: skip
        return PromptTable(texts, ids, columns | ({"messages": prompts} if chat else {}))

    @property
    def columns(self) -> dict[str, list[Any]]:
        """All columns of the training rows except the prompt."""
        return self._fit_state("columns").table.columns

    @property
    def n_rows(self) -> int:
        """Number of training rows, each of which can have a weight; see :meth:`set_weights`."""
        return len(self._fit_state("n_rows").table)

    @property
    def prompt_lengths(self) -> set[int]:
        """Numbers of tokens that the prompts of all splits have."""
        return {len(ids) for table in self._tables.values() for ids in table.prompt_ids}

    def peek(self, split: str, n: int = 1) -> PromptBatch | None:
        """The first prompts of ``"train"`` or ``"val"``, or None; the training position does not change."""
        table = self._tables.get(split)
        return None if table is None else table.batch(list(range(min(n, len(table)))))

    def upcoming(self) -> PromptBatch:
        """The prompts of the next update, unless sampling weights change before; the training position does not."""
        training = self._fit_state("upcoming")
        return training.table.batch(training.order.rows(training.position).tolist())

    def set_weights(self, weights: Sequence[float] | torch.Tensor | None) -> None:
        """From the next batch on, draw the rows of each batch by weight.

        Args:
            weights: One non-negative number per training row. Rows come in proportion to it, so one with a large weight
                can come several times in a batch. Rows with 0 are never drawn; a batch is smaller if fewer than
                ``batch_size`` rows are left. None: every row once per epoch again.
        """
        training = self._fit_state("set_weights")
        where = f"{type(self).__name__}.set_weights"
        checked = None if weights is None else checked_weights(where, weights, len(training.table))
        self._weights = training.order.weights = checked

    def train_dataloader(self) -> DataLoader[Any]:
        """The batches of one epoch, from the current position."""
        training = self._fit_state("train_dataloader")
        # resumed from a checkpoint without a position, which a loop of the user's own has written
        training.position = max(training.position, self._batches_trained() or 0)
        training.order.repeat = self._overfit_batches(len(training))
        return self._loader(training)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation prompts; without any, ``fit`` does not validate.

        Raises:
            ValueError: There are none, and ``trainer.validate`` asks for them.
        """
        return self._held_out("val") if "val" in self._tables or self._validates else []

    def test_dataloader(self) -> DataLoader[Any]:
        """The prompts of ``test_path``.

        Raises:
            ValueError: There are none.
        """
        return self._held_out("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The prompts of ``predict_path``.

        Raises:
            ValueError: There are none.
        """
        return self._held_out("predict")

    def _held_out(self, split: str) -> DataLoader[Any]:
        if split not in self._tables:
            refuse(self, f"{split}_path", None, "there are no prompts; give a file")
        return self._loader(HeldOutPrompts(self._tables[split], self.batch_size))

    @staticmethod
    def _loader(prompts: TrainingPrompts | HeldOutPrompts) -> DataLoader[Any]:
        # its own generator: by default a loader draws from the global one, which the model uses
        return ResumableLoader(prompts, batch_size=None, num_workers=0, generator=torch.Generator())

    def state_dict(self) -> dict[str, Any]:
        """Position, sampling weights and the identity of the data."""
        if self._training is None:
            return {}
        # a batch that was drawn but not finished (the run stopped) is drawn again
        trained = self._batches_trained()
        position = self._training.position if trained is None else min(self._training.position, trained)
        weights = None if self._weights is None else torch.from_numpy(self._weights)
        return {"position": position, "weights": weights, **self._identity(self._training)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the next batch.

        Raises:
            ValueError: Data, ``batch_size`` or seed differ from those of the saved run.
        """
        if not state_dict or (self.trainer is not None and self.trainer.state.fn != "fit"):
            return  # other prompts are fine for validation
        training = self._fit_state("load_state_dict")
        check_identity(self, state_dict, self._identity(training), "prompts")
        position, weights = state_dict.get("position"), state_dict.get("weights", "none")
        if not isinstance(position, int) or not isinstance(weights, torch.Tensor | None):
            problem = "cannot resume from the checkpoint: in its state of the data, position must be an integer and"
            raise ValueError(f"{self.where('path')}: {problem} weights a tensor or None; give another checkpoint")
        training.position = position
        self._weights = training.order.weights = None if weights is None else weights.numpy()

    def _identity(self, training: TrainingPrompts) -> dict[str, Any]:
        order, val = training.order, self._tables.get("val")
        fingerprints = {"fingerprint": training.table.fingerprint, "validation": val and val.fingerprint}
        return {"rows": order.n_rows, "batch_size": order.batch_size, "seed": order.seed, **fingerprints}

    def _batches_trained(self) -> int | None:
        """Batches that the trainer has finished over all epochs; None without a trainer."""
        if self.trainer is None:
            return None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(progress.processed)

    def _overfit_batches(self, n_batches: int) -> int | None:
        """The number of batches that ``Trainer(overfit_batches=...)`` repeats."""
        asked = self.trainer.overfit_batches if self.trainer is not None else 0  # type: ignore[attr-defined]
        if not asked:
            return None
        return min(asked, n_batches) if isinstance(asked, int) else max(1, int(asked * n_batches))

    def _fit_state(self, name: str) -> TrainingPrompts:
        if self._training is None:
            raise RuntimeError(f"{type(self).__name__}.{name}: there are no data yet; call setup('fit') first")
        return self._training
