"""The result of a run: the model in Hugging Face format."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L

from lit_ppo.models.lora import check_has_adapter
from lit_ppo.parallel.checkpoint_io import PARTIAL, atomic_path
from lit_ppo.parallel.ranks import rank
from lit_ppo.parallel.sharding import is_sharded


class ExportModel(L.Callback):
    """After ``fit`` writes the trained model with ``save_pretrained``, for ``from_pretrained`` to load.

    Args:
        dirpath: Folder for the model; a model that is there is replaced. None: ``model`` in the run's folder.
        adapter: Write the trained adapter alone, for ``peft``. By default it is merged into the model.
    """

    def __init__(self, dirpath: str | None = None, adapter: bool = False) -> None:
        self.dirpath = dirpath
        self.adapter = adapter
        self.written: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check before training that the module can be exported and the folder may be replaced.

        Raises:
            TypeError: A folder is given, but the module cannot be exported.
            ValueError: The folder holds something else than a model, or there is no adapter.
        """
        check_has_adapter(f"ExportModel(adapter={self.adapter})", pl_module, self.adapter)
        if self.dirpath is not None:
            check_target(f"ExportModel(dirpath={self.dirpath!r})", Path(self.dirpath))
        if stage == "fit" and self.dirpath is not None and not hasattr(pl_module, "save_pretrained"):
            raise TypeError(
                f"ExportModel(dirpath={self.dirpath!r}): {type(pl_module).__name__} has no save_pretrained(dirpath); "
                "write one, or leave export.dirpath out"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        log_dir = trainer.log_dir  # collective: before anything that only one rank does
        if trainer.fast_dev_run or not hasattr(pl_module, "save_pretrained"):  # type: ignore[attr-defined]
            return
        target = Path(self.dirpath or Path(log_dir or trainer.default_root_dir) / "model")
        if trainer.is_global_zero or is_sharded(pl_module):
            write_model(pl_module, target, adapter=self.adapter)
        trainer.strategy.barrier("model exported")
        self.written = target


def check_target(where: str, folder: Path) -> None:
    """Refuse to replace a folder that is not a model.

    Raises:
        ValueError: The folder holds something else.
    """
    is_model = any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    if folder.exists() and not is_model and any(folder.iterdir()):
        raise ValueError(f"{where}: the folder holds files that are not a model; name a new folder")


def write_model(module: Any, target: Path, *, adapter: bool = False) -> None:
    """Write a model, and replace the one at ``target`` once it is complete. Collective if the model is sharded.

    Args:
        module: Has ``save_pretrained``.
        target: Folder.
        adapter: Write the adapter alone.
    """
    partial = target.with_name(target.name + PARTIAL)
    with atomic_path(target) if rank() == 0 else nullcontext(partial) as folder:
        if rank() == 0:
            folder.mkdir()
        module.save_pretrained(folder, **({"adapter": True} if adapter else {}))
