"""The result of a run: the model in Hugging Face format."""

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError

from lit_ppo.constructor import constructor
from lit_ppo.models.card import Card, add_data, write_card
from lit_ppo.models.export import checked_dtype, checked_repository, list_files, push
from lit_ppo.models.lora import check_has_adapter
from lit_ppo.models.stored import Dtype
from lit_ppo.parallel.files import atomic_path
from lit_ppo.parallel.ranks import gather_shares, rank
from lit_ppo.parallel.sharding import is_sharded
from lit_ppo.rewards.folders import folders_of
from lit_ppo.run.figures import Figures
from lit_ppo.run.target import check_target
from lit_ppo.shown import first_line
from lit_ppo.validate import boolean, path_or_none

CARD = "lit_ppo_card"  # key of what ExportModel adds to a checkpoint


class ExportError(RuntimeError):
    """The model cannot be written; the message names the folder and says what to do."""


class ExportModel(L.Callback):
    """After ``fit`` writes the trained model with ``save_pretrained``, for ``from_pretrained`` to load.

    A model card (README.md) says what the model was trained from, on and for, with the command and figures of the run.

    Args:
        dirpath: Folder for the model; an exported model that is there is replaced, and anything else is refused. None:
            ``model`` in the run's folder.
        adapter: Write the trained adapter alone, for ``peft``. By default it is merged into the model.
        dtype: Of the weights; None: that of the checkpoint that the run started from.
        push_to_hub: Then push the folder to this repository, such as ``me/my-model``, which is made if need be.
        private: Whether a new repository is private; None: as the account's settings say.
    """

    @constructor
    def __init__(
        self,
        dirpath: str | None = None,
        adapter: bool = False,
        dtype: Dtype | None = None,
        push_to_hub: str | None = None,
        private: bool | None = None,
    ) -> None:
        self.dirpath = path_or_none(self, "dirpath", dirpath)
        self.adapter = boolean(self, "adapter", adapter)
        self.dtype = checked_dtype(self, dtype)
        self.push_to_hub = checked_repository(self, push_to_hub)
        self.private = None if private is None else boolean(self, "private", private)
        self.written: Path | None = None
        self.command: str | None = None  # of this run, set by the command
        self._card: Card | None = None
        self._commands: list[str] = []
        self._figures = Figures()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check before training that the module can be exported and the folder may be replaced.

        Raises:
            TypeError: A folder, a repository or a dtype is given, but the module cannot be exported.
            ValueError: The folder holds something that no export has written, or there is no adapter.
        """
        check_has_adapter(f"ExportModel(adapter={self.adapter})", pl_module, self.adapter)
        target = self._target(trainer)
        if self.dirpath is not None or (hasattr(pl_module, "save_pretrained") and stage == "fit"):
            check_target(self._where(target), target, used=folders_of(pl_module))
        if stage != "fit":
            return
        for name in ("dirpath", "push_to_hub", "dtype"):
            _check_can_save(f"ExportModel({name}={getattr(self, name)!r})", pl_module, name, getattr(self, name))
        if self.push_to_hub is not None and huggingface_hub.get_token() is None:
            rank_zero_warn(
                f"ExportModel(push_to_hub={self.push_to_hub!r}): there is no token of the hub, so this will fail "
                "when training ends; run `hf auth login`, or set HF_TOKEN"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._figures.start(trainer)
        card: Any = getattr(pl_module, "card", None)
        self._card = None if card is None else add_data(card(), trainer)
        if self.command is not None and self._commands[-1:] != [self.command]:
            self._commands.append(self.command)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._figures.add_update(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._figures.add_validation(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        target = self._target(trainer)  # collective: before anything that only one rank does
        if trainer.fast_dev_run or not hasattr(pl_module, "save_pretrained"):  # type: ignore[attr-defined]
            return
        writes = trainer.is_global_zero or is_sharded(pl_module)
        options: dict[str, Any] = {"adapter": self.adapter, "dtype": self.dtype, "card": card_of(self._state())}
        gather_shares(lambda: write_model(self._where(target), pl_module, target, **options) if writes else None)
        self.written = target
        if (repository := self.push_to_hub) is not None:
            where = f"ExportModel(push_to_hub={repository!r})"
            gather_shares(lambda: push(where, target, repository, self.private) if rank() == 0 else None)

    def _target(self, trainer: L.Trainer) -> Path:
        log_dir = trainer.log_dir  # collective
        return Path(self.dirpath or Path(log_dir or trainer.default_root_dir) / "model")

    def _where(self, target: Path) -> str:
        return f"ExportModel(dirpath={str(target)!r})"

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if (state := self._state()) is not None:
            checkpoint[CARD] = state

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if (state := checkpoint.get(CARD)) is not None:
            self._card, self._commands = state["card"], list(state["commands"])
            self._figures.load_state_dict(state["figures"])

    def _state(self) -> dict[str, Any] | None:
        """What the model card is made of, as plain values."""
        if self._card is None:
            return None
        return {"card": self._card, "commands": list(self._commands), "figures": self._figures.state_dict()}


def card_of(state: dict[str, Any] | None) -> Card | None:
    """The full model card, from what :class:`ExportModel` adds to a checkpoint; None if there is nothing."""
    if state is None:
        return None
    card: Card = state["card"]
    figures = Figures()
    figures.load_state_dict(state["figures"])
    measured = {**figures.means(), **figures.held_out}
    rows = [[name, v[0] if len(v) > 1 else None, v[-1]] for name, v in measured.items() if "throughput/" not in name]
    unit = "update" if card["method"] == "PPO" else "step"
    means = f"Means over the first and the last {figures.ends}" if figures.ends > 1 else "The first and the last"
    said = f"{means} of {figures.done} {unit}s" if figures.done > 1 else f"Of one {unit}"
    said += "; `val/...`: the first and the last validation." if figures.held_out else "."
    return {**card, "figures": rows, "figures_of": said, "commands": state["commands"]}


def _check_can_save(where: str, module: Any, name: str, value: Any) -> None:
    save: Any = getattr(module, "save_pretrained", None)
    if value is not None and save is None:
        raise TypeError(
            f"{where}: {type(module).__name__} has no save_pretrained(dirpath); write one, or leave export.{name} out"
        )
    if name == "dtype" and value is not None and "dtype" not in inspect.signature(save).parameters:
        raise TypeError(f"{where}: {type(module).__name__}.save_pretrained takes no dtype; leave export.dtype out")


def write_model(
    where: str,
    module: Any,
    target: Path,
    *,
    adapter: bool = False,
    dtype: Dtype | None = None,
    card: Card | None = None,
) -> None:
    """Write a model, and replace the one at ``target`` once it is complete. Collective if the model is sharded.

    Args:
        where: Class or option, argument and value, for messages.
        module: Has ``save_pretrained``.
        target: Folder.
        adapter: Write the adapter alone.
        dtype: Of the weights; None: as ``save_pretrained`` chooses.
        card: Model card in place of the one that ``save_pretrained`` writes.

    Raises:
        ExportError: It cannot be written; what is at ``target`` stays.
        ValueError: Something that no export has written has come there meanwhile.
    """
    options = {k: v for k, v in {"adapter": adapter, "dtype": dtype}.items() if v}
    if rank() != 0:
        module.save_pretrained(target, **options)  # takes part, and writes nothing
        return
    try:
        with atomic_path(target, check=partial(check_target, where, target)) as folder:
            folder.mkdir()
            module.save_pretrained(folder, **options)
            if card is not None:
                write_card(folder, card, adapter=adapter)
            list_files(folder, all_files=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ExportError(
            f"{where}: the model cannot be written ({reason}); what is there is kept. Free disk space or name another "
            "folder; lit-ppo export --ckpt_path ... --output ... writes the model of a checkpoint"
        ) from error
