"""Checks of the Trainer: strategy and precision before models are loaded, and whether checkpoints can be written."""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

import lit_ppo.parallel.strategies  # noqa: F401  # registers fsdp2
from lit_ppo.parallel.checkpoint_io import guard_sharded
from lit_ppo.parallel.lost_ranks import watch_instead_of_lightning
from lit_ppo.validate import refuse

COPIES = 3  # the weights and the two moments of AdamW
UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def check_trainer(trainer: L.Trainer) -> None:
    """Refuse the first version of FSDP and sharded checkpoints with code, and have lost ranks named.

    Warns if the CPU emulates bf16.

    Raises:
        ValueError: The strategy is Lightning's ``FSDPStrategy``.
    """
    guard_sharded(trainer)
    watch_instead_of_lightning()
    if isinstance(trainer.strategy, FSDPStrategy):
        raise ValueError(
            "Trainer(strategy=FSDPStrategy): the first version of FSDP is not supported; use strategy='fsdp2'"
        )
    bf16 = trainer.precision in ("bf16-mixed", "bf16-true")
    if bf16 and trainer.strategy.root_device.type == "cpu" and emulates_bf16():
        rank_zero_warn(
            f"Trainer(precision={trainer.precision!r}): this CPU has no bf16 instructions and emulates them, which can "
            "take 100 times as long; use precision='32-true'"
        )


def emulates_bf16() -> bool:
    """Whether bf16 matrix products on this CPU do without oneDNN's kernels."""
    return torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_disk(trainer: L.Trainer, model: nn.Module) -> None:
    """Report the size of checkpoints, and refuse a disk that cannot hold them.

    Raises:
        ValueError: Names the folder, what is free and what is needed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained = sum(p.numel() for p in parameters)
    size = COPIES * sum(p.numel() * p.element_size() for p in parameters)
    for callback in trainer.checkpoint_callbacks:
        given = getattr(callback, "dirpath", None)
        folder, keep = Path(given or trainer.default_root_dir), _kept(callback)
        free, held = shutil.disk_usage(_nearest(folder)).free, _size_of_steps(folder)
        rank_zero_info(
            f"{trained:,} trained parameters; a checkpoint takes about {readable_size(size)}, at most {keep} "
            f"{'is' if keep == 1 else 'are'} kept in {folder}, {readable_size(free)} are free"
        )
        count = min(keep + 1, _written(trainer, callback))  # the next one is written before the oldest is removed
        needed = max(count * size - held, size)  # of a resumed run, some are there already
        if free < needed:
            owner, name = (callback, "dirpath") if given else ("Trainer", "default_root_dir")
            problem = f"{readable_size(free)} free, {count} checkpoints need {readable_size(needed)}"
            remedy = "free some space, keep fewer or choose another folder"
            refuse(owner, name, str(folder), f"{problem}{' more' if held else ''}; {remedy}")


def _kept(callback: Any) -> int:
    """How many checkpoints a callback keeps."""
    kept: Any = getattr(callback, "keep", None) or getattr(callback, "save_top_k", 1)
    return max(1, int(kept))


def _written(trainer: L.Trainer, callback: Any) -> int:
    """The most checkpoints that a callback writes in a run, with the one at its end."""
    every, steps = getattr(callback, "every_n_train_steps", 0), trainer.max_steps
    return max(1, steps // every + bool(steps % every)) if every and steps > 0 else sys.maxsize


def check_writable(owner: object, name: str, folder: Path) -> None:
    """Check that a folder can be made and written to; nothing is left behind.

    Raises:
        ValueError: It cannot; names the argument.
    """
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)) as file:
            file.write(b"x" * 2**12)
            file.flush()
    except OSError as error:
        refuse(owner, name, str(folder), f"cannot be written to ({error.strerror}); choose another folder")


def readable_size(n_bytes: float) -> str:
    """A size in the unit that fits it.

    >>> readable_size(199_500), readable_size(3 * 2**30), readable_size(12)
    ('194.8 KiB', '3.0 GiB', '12 bytes')
    """
    unit = 0
    while n_bytes >= 1024 and unit + 1 < len(UNITS):
        n_bytes, unit = n_bytes / 1024, unit + 1
    return f"{n_bytes:.1f} {UNITS[unit]}" if unit else f"{n_bytes:.0f} bytes"


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _size_of_steps(folder: Path) -> int:
    files: list[Path] = [path for step in folder.glob("step-*.ckpt") for path in (step, *step.glob("*"))]
    return sum(path.stat().st_size for path in files if path.is_file())
