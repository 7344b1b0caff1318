"""A run that continues from a checkpoint: which one, what has changed since, and the folder that it keeps using."""

import os
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from lit_ppo.parallel.checkpoint_io import CheckpointError, DamagedCheckpointError, is_complete, read_summary
from lit_ppo.ppo.module import LitPPO
from lit_ppo.run.checkpoint import RUN, find_checkpoints, find_runs_checkpoints, steps_logged
from lit_ppo.run.errors import CommandError
from lit_ppo.run.folder import PREFIX, claim_version, is_completed
from lit_ppo.run.resume import changes, check_changes, describe_changes
from lit_ppo.supervised.base import SupervisedModule


class Continuation:
    """The checkpoint that a run starts from, and the run folder that comes with it.

    ``last`` is the newest checkpoint of ``run``, or else of all runs under ``root``; ``auto`` is the same, or a new run
    if there is none. Both keep using the run folder of the checkpoint. A path starts a new folder.

    Args:
        given: ``--ckpt_path``.
        root: ``trainer.default_root_dir``.
        dirpath: ``checkpoint.dirpath``.
        keep_folder: False makes a new run folder in any case.
        run: The run folder whose configuration was given.

    Raises:
        CommandError: There is no such checkpoint.
    """

    def __init__(
        self, given: str | None, root: Path, dirpath: str | None, *, keep_folder: bool, run: Path | None = None
    ) -> None:
        self.path, self._given = given, given
        self.folder: Path | None = None  # run folder to keep using
        self.claimed: Path | None = None  # run folder that this command has made
        self.notes: list[str] = []  # about damaged checkpoints
        self.steps_logged = 0  # steps whose logs were complete when the checkpoint was written
        self.completed = False  # whether the run that it keeps using has done everything; known after ``compare``
        if given in ("last", "auto"):
            try:
                candidates = find_runs_checkpoints(root, dirpath) if run is None else find_own_checkpoints(run, dirpath)
            except CommandError:
                if given == "last":
                    raise
                self.path = None
            else:
                found, self.notes = find_intact(given, candidates)
                self.path = str(found)
            folder = run or (Path() if self.path is None else Path(self.path).parent.parent)
            self.folder = folder if keep_folder and folder.name.startswith(PREFIX) else None
        elif given is not None and "://" not in given:
            check_given(given)

    def compare(self, config: dict[str, Any]) -> list[str]:
        """Describe the changes since the checkpoint was written, one line each; empty without changes.

        Args:
            config: Effective configuration of the run that continues.

        Raises:
            CommandError: A value changed that cannot change within a run.
        """
        if self.path is None or "://" in self.path:
            return []
        summary = read_summary(Path(self.path))
        self.steps_logged = steps_logged(summary)
        run = summary.get(RUN) or {}
        saved = run.get("config")
        known = self._given in ("last", "auto") and saved is not None
        self.completed = known and is_completed(Path(self.path), run)
        changed = {} if saved is None else changes(saved, config)
        check_changes(self.path, changed)
        if self.folder is not None and "trainer.default_root_dir" in changed:
            self._check_root(Path(config["trainer"]["default_root_dir"]))
        lines = describe_changes(changed)
        name = config["model"]["class_path"]
        rates = any(key.startswith(("model.init_args.", "optimizer.", "lr_scheduler.")) for key in changed)
        if rates and not issubclass(resolve_name(name), LitPPO | SupervisedModule):
            lines.append(f"{name}: Lightning restores optimizers and schedules as they were saved")
        return lines

    def _check_root(self, root: Path) -> None:
        """Refuse another root than that of the run folder, which the run keeps using."""
        assert self.folder is not None
        if root.absolute() != self.folder.parent.absolute():
            raise CommandError(
                f"--trainer.default_root_dir {root}: the run of {self.path} goes on in its own folder, {self.folder}; "
                "leave the option out, or give the checkpoint's path as --ckpt_path, which starts a new folder",
                exit_code=2,
            )

    def logger(self, root: Path) -> TensorBoardLogger:
        """TensorBoard in the continued run folder, or in a new one under ``root``."""
        # From purge_step on, readers drop what was logged before. A new run purges from 0: without it, TensorBoard
        # takes the first resumed start for the start of the run and drops nothing.
        version = self._claim(root) if self.folder is None else int(self.folder.name.removeprefix(PREFIX))
        purge = 0 if self.folder is None else self.steps_logged
        root = root if self.folder is None else self.folder.parent
        return TensorBoardLogger(root, name="", version=version, default_hp_metric=False, purge_step=purge)

    def run_folder(self, root: Path) -> str | None:
        """The continued run folder, or a new one, for loggers without folders; None except in the first process."""
        if self.folder is not None:
            return str(self.folder)
        version = self._claim(root)
        return None if version is None else str(root / f"{PREFIX}{version}")

    def _claim(self, root: Path) -> int | None:
        version = claim_version(root)
        self.claimed = None if version is None else root / f"{PREFIX}{version}"
        return version


def run_folder(files: Sequence[Path]) -> Path | None:
    """The folder of the run whose saved configuration is among the files, the last one; None if there is no such run.

    Args:
        files: Configuration files; a run's lies in its folder.
    """
    folders = [file.parent for file in files if file.name == "config.yaml"]
    found = [folder for folder in folders if folder.name.startswith(PREFIX) or find_checkpoints(folder)]
    return found[-1] if found else None


def find_own_checkpoints(folder: Path, dirpath: str | None = None) -> list[Path]:
    """The complete checkpoints of one run, oldest first.

    Args:
        folder: The run folder.
        dirpath: ``checkpoint.dirpath``, where other runs may save, too.

    Raises:
        CommandError: There is none.
    """
    found = find_checkpoints(Path(dirpath or folder))
    if dirpath is not None:
        found = [path for path in found if _folder_of(path) in (None, folder.resolve())]
    if not found:
        where = "" if dirpath is None else f" in {dirpath}"
        raise CommandError(
            f"--ckpt_path last: no complete checkpoint of the run {folder}{where}; leave --ckpt_path out to start a "
            "new run, or give a checkpoint's path"
        )
    return found


def _folder_of(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint; None if it cannot be read."""
    try:
        folder = (read_summary(checkpoint, compare=False).get(RUN) or {}).get("folder", os.pardir)
    except (CheckpointError, OSError):
        return None
    return Path(checkpoint.parent, folder).resolve()


def check_given(given: str, *, words: str = ", or 'last'") -> None:
    """Check that a path can be that of a checkpoint.

    Args:
        given: ``--ckpt_path``.
        words: What may be given in place of a path, for messages.

    Raises:
        CommandError: It is empty, there is nothing, or it is a folder that is not a sharded checkpoint.
        CheckpointError: It is a sharded checkpoint that is damaged.
    """
    path = Path(given)
    if not given.strip():
        raise CommandError("--ckpt_path '': empty; give a checkpoint's path, 'last' or 'auto', or leave it out", 2)
    if not path.exists():
        raise CommandError(f"--ckpt_path {given}: no such file; give a checkpoint's path{words}")
    if not is_complete(path):
        inside = find_checkpoints(path)
        remedy = f"give {inside[-1]}" if inside else f"give a checkpoint's path{words}"
        raise CommandError(f"--ckpt_path {given}: a folder, not a checkpoint; {remedy}", 2)
    if path.is_dir():
        read_summary(path)  # the strategy reads it without checks


def find_intact(given: str, found: Sequence[Path]) -> tuple[Path, list[str]]:
    """The newest checkpoint if it is intact; for ``auto``, the newest intact one.

    Args:
        given: ``last`` or ``auto``, for messages.
        found: Checkpoints, oldest first.

    Returns:
        The checkpoint, and what to say about damaged ones.

    Raises:
        CommandError: The newest is damaged and ``auto`` was not given, or all are damaged.
    """
    damaged = []
    for path in reversed(found):
        try:
            read_summary(path)
        except DamagedCheckpointError as error:
            damaged.append(f"checkpoint {path}: {error.reason}")
            continue
        if damaged and given != "auto":
            raise CommandError(
                f"--ckpt_path {given}: {damaged[0]}; the newest intact checkpoint is {path}; give --ckpt_path auto to "
                "resume from it, or its path"
            )
        return path, [f"--ckpt_path {given}: {each}; using {path}, an earlier one" for each in damaged]
    raise CommandError(
        f"--ckpt_path {given}: {'; '.join(damaged[:2])}; no checkpoint is intact ({len(damaged)} tried); restore one "
        "from a backup, or leave --ckpt_path out to start a new run"
    )
