"""``lit-ppo`` as a LightningCLI: what it adds to the parser, and the order in which things are built."""

import math
import os
import re
import shlex
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from transformers.utils.logging import disable_progress_bar

import lit_ppo.callbacks
from lit_ppo.cli.arguments import LayeredParser, complete
from lit_ppo.cli.errors import parsing_error
from lit_ppo.cli.layers import check_additions
from lit_ppo.cli.session import LIGHTNING_LOG, Session
from lit_ppo.cli.stages import Stage, check_stages_stay, files_of, run_stages
from lit_ppo.console.progress import progress_bar
from lit_ppo.console.report import RunReport
from lit_ppo.console.summary import RunSummary
from lit_ppo.parallel.environment import check_starts_commands, reserve_port
from lit_ppo.parallel.files import VERIFY
from lit_ppo.parallel.lost_ranks import explain
from lit_ppo.run.checkpoint import StepCheckpoint, find_checkpoints
from lit_ppo.run.continuation import Continuation, find_own_checkpoints, run_folder
from lit_ppo.run.errors import CommandError
from lit_ppo.run.export import ExportModel
from lit_ppo.run.folder import RunTrainer, discard_unused

for _name in lit_ppo.__all__:
    getattr(lit_ppo, _name)  # the parser knows the short names of imported classes only


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration of ``fit`` as Lightning does, but over nothing that is not such a file."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return  # an evaluation may write into the folder of a run
        file = Path(trainer.log_dir or trainer.default_root_dir) / self.config_filename  # log_dir is collective
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        if text and not text.startswith("# lightning.pytorch==") and not self.already_saved:
            raise CommandError(
                f"{file}: the run's configuration would replace this file, which no run has written; set "
                "--trainer.default_root_dir to another folder"
            )
        super().setup(trainer, pl_module, stage)


class Command(LightningCLI):
    """Parses the configuration, runs the stages, builds model, data and trainer, and runs the subcommand.

    Args:
        session: This run of the command.
        instead: Called instead of all but parsing, with the model, which has loaded nothing, the configuration as plain
            values, and those of its stages by name.
    """

    def __init__(self, session: Session, instead: Callable[..., None] | None = None) -> None:
        self.session = session
        self.instead = instead
        self.heartbeat = session.heartbeat
        self.logs_again = False  # whether TensorBoard drops and needs again what the checkpoint's run had logged
        super().__init__(
            model_class=L.LightningModule,
            trainer_class=RunTrainer,
            subclass_mode_model=True,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},  # a continued run writes into the same folder
            trainer_defaults={"default_root_dir": "runs", "log_every_n_steps": 1},
            seed_everything_default=42,
            parser_class=LayeredParser,
            args=session.arguments,
            auto_configure_optimizers=False,
        )

    @property
    def _config(self) -> Namespace:
        config: Namespace = self.config[self.config.subcommand]
        return config

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("prog", "lit-ppo")  # also for python -m lit_ppo
        # abbreviations would hide mistyped options; errors are raised, and become one line in _parse
        return super().init_parser(allow_abbrev=False, exit_on_error=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--stages", type=list[Stage] | None, default=None, help="Runs that fit does first, each in its own process."
        )
        parser.add_argument(
            "--data_root", type=str | None, default=None, help="Folder that relative paths of the data start from."
        )
        parser.add_argument(
            "--verify", type=bool, default=True, help="Compare checkpoints and models with their checksums when read."
        )
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExportModel, "export")
        parser.add_lightning_class_args(RunReport, "report")
        parser.description = f"{parser.description or ''} Add --debug for tracebacks of errors.".strip()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and hand ``data_root`` to the data."""
        self.heartbeat.begin("reading the configuration")
        self.config = self._parse(parser, args)
        config = self._config
        if not config.verify:
            os.environ[VERIFY] = "0"  # ranks and stages inherit it
        if (
            not complete(config, trains=self.config.subcommand == "fit")
            and not config.stages
            and "LIT_PPO_STAGE" not in os.environ
        ):
            raise CommandError(
                f"--data_root {config.data_root}: neither the data module nor a stage takes it; leave it out",
                exit_code=2,
            )

    def _parse(self, parser: LightningArgumentParser, arguments: list[str]) -> Namespace:
        check_additions(arguments)
        try:
            config: Namespace = parser.parse_args(arguments)
            return config
        except ArgumentError as error:
            parsers = [parser, *self._subcommand_parsers.values()]
            options = sorted({option for each in parsers for option in each._option_string_actions})
            raise CommandError(parsing_error(error, options, arguments), exit_code=2) from error

    def _stages(self, config: Namespace) -> dict[str, tuple[list[str], dict[str, Any]]]:
        """Arguments and effective configuration of every stage, by name."""
        found: dict[str, tuple[list[str], dict[str, Any]]] = {}
        for stage in config.stages or []:
            arguments = Stage(**vars(stage)).arguments(config.seed_everything, config.data_root)
            try:
                parsed = self._parse(self._parser("fit"), arguments)
                complete(parsed)
            except CommandError as error:
                raise CommandError(f"stage {stage.name!r}: {error}", error.exit_code) from error
            if stage.name in found or not re.fullmatch(r"[\w.-]+", stage.name):
                raise CommandError(f"stage {stage.name!r}: names must be unique and made of letters, digits, '_-.'")
            if parsed.stages:
                raise CommandError(f"stage {stage.name!r}: its configuration has stages of its own; list them here")
            found[stage.name] = (arguments, self._effective(parsed))
        return found

    def _effective(self, config: Namespace) -> dict[str, Any]:
        """The full configuration, defaults included, as plain values."""
        dumped = self._parser("fit").dump(config, skip_link_targets=False, skip_unset=False, format="yaml")
        return dict(yaml.safe_load(dumped))

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint to start from. Unlike in Lightning, its hyperparameters override no argument."""
        if self.instead is not None:
            return
        config, is_fit = self._config, self.config.subcommand == "fit"
        root, dirpath = Path(config.trainer.default_root_dir), config.checkpoint.dirpath
        files = [Path(str(file.absolute)) for file in config.config or []]
        given, self.given_run = config.ckpt_path, run_folder(files)
        if not is_fit and given is None and self.given_run is not None:
            with suppress(CommandError):  # there is no checkpoint
                given = "last" if find_own_checkpoints(self.given_run, dirpath) else None
        self.continuation = Continuation(given, root, dirpath, keep_folder=is_fit, run=self.given_run)
        config.ckpt_path = self.continuation.path
        for note in self.continuation.notes:
            self.heartbeat.say(note)
        if not is_fit:
            untrained = "no checkpoint: the model as its configuration names it; give --ckpt_path to choose one"
            self.heartbeat.say(f"{self.config.subcommand}: weights of {config.ckpt_path or untrained}")
        if is_fit and config.ckpt_path:
            effective = self._effective(config)
            changed = self.continuation.compare(effective)
            saved = Path(config.ckpt_path)
            if self.continuation.completed and not changed and not _newer(files_of({"data": effective["data"]}), saved):
                self.heartbeat.say(
                    f"fit: the run of {config.ckpt_path} is complete, nothing is left to do; to train longer, raise "
                    "trainer.max_steps or trainer.max_epochs; to start a new run, leave --ckpt_path out"
                )
                raise SystemExit(0)
            check_stages_stay(config.ckpt_path, self._stages(config))
            if changed:
                lines = [f"Resuming {config.ckpt_path} with another configuration:", *changed]
                self.heartbeat.say("\n  ".join(lines), doing="reading the configuration")

    def before_instantiate_classes(self) -> None:
        """Run the stages: models and data of this run may be what they write."""
        config = self._config
        if self.instead is not None:
            stages = {name: effective for name, (_, effective) in self._stages(config).items()}
            given = Namespace(model=config.model)  # type: ignore[no-untyped-call]
            model = self._parser("fit").instantiate_classes(given).model
            self.instead(model, self._effective(config), stages)
            raise SystemExit(0)
        check_starts_commands(config.trainer.strategy)
        if self.subcommand == "fit" and config.stages:
            run_stages(self.session, self._stages(config))
        self.heartbeat.say(f"{self.subcommand}: building model, data and trainer")
        if config.trainer.enable_progress_bar is False:
            self.heartbeat.quiet = math.inf
            disable_progress_bar()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add the default logger, the run folder and what an interrupt has to end."""
        config = self._get(self.config_init, "trainer")
        root = Path(config.default_root_dir)
        if (config.logger is None or config.logger is True) and not config.fast_dev_run:
            kwargs["logger"] = self.continuation.logger(root)
            self.logs_again = self.continuation.folder is not None
        self.session.discard = self._discard
        trainer: Any = super().instantiate_trainer(**kwargs)
        reserve_port(trainer.strategy)
        if trainer.needs_folder and not trainer.fast_dev_run and self.subcommand in ("fit", "predict"):
            trainer.run_folder = self.continuation.run_folder(root)
        self.session.interrupts.kill_children.append(lambda: _kill_ranks(trainer))
        self.session.explain = lambda error: explain(error, getattr(trainer.strategy.launcher, "procs", []))
        return trainer  # type: ignore[no-any-return]

    def _discard(self) -> None:
        """Remove the folder that this command has made, if the run ends before its first update."""
        trainer = getattr(self, "trainer", None)
        if self.continuation.claimed is not None and (trainer is None or not trainer.global_step):
            discard_unused(self.continuation.claimed)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if config.get("enable_progress_bar") is not False:
            if any(isinstance(callback, ProgressBar) for callback in given):
                self.heartbeat.quiet = math.inf  # that bar has the console
            else:
                given = [progress_bar(self.heartbeat), *given]  # first: its line ends before others print at the end
            callbacks = [*callbacks, RunSummary()]
        config = {**config, "callbacks": given}
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, StepCheckpoint)]
        trainer: L.Trainer = super()._instantiate_trainer(config, callbacks)
        return trainer

    def before_fit(self) -> None:
        """Give checkpoints the configuration and the model card the command; tell an interrupt where this run saves."""
        checkpoint, export = (self._get(self.config_init, key) for key in ("checkpoint", "export"))
        export.command = shlex.join(["lit-ppo", *self.session.arguments])
        checkpoint.config, checkpoint.log_again = self._effective(self._config), self.logs_again
        self.session.interrupts.will_stop = lambda: checkpoint.stop_request.listening
        # Lightning says so also where a callback has ended the epoch early
        LIGHTNING_LOG.addFilter(
            lambda record: not (self.trainer.should_stop and "stopped: `max_epochs=" in record.getMessage())
        )
        # printed already, as old -> new
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks used to create")
        if self.trainer.is_global_zero and checkpoint in self.trainer.callbacks:  # type: ignore[attr-defined]
            folder = checkpoint.dirpath or Path(self.trainer.log_dir or self.trainer.default_root_dir) / "checkpoints"
            self.session.checkpoints = Path(folder)
            if self.given_run is not None:  # its configuration would resume that run, not the one that starts here
                own = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "config.yaml"
                self.session.resumes_with = ["fit", "--config", str(own)]

    def after_fit(self) -> None:
        """Print where the results are."""
        trainer = self.trainer
        log_dir = trainer.log_dir  # collective
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(log_dir or trainer.default_root_dir)
        checkpoint, export = (self._get(self.config_init, key) for key in ("checkpoint", "export"))
        shown = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        saved = [path.name for path in find_checkpoints(Path(checkpoint.dirpath or folder))]
        lines = {
            "Run folder": str(folder),
            "Model": f"{export.written}  (load it with from_pretrained)" if export.written else None,
            "Checkpoints": f"{checkpoint.dirpath}  ({', '.join(saved)})" if saved else None,
            "TensorBoard": f"tensorboard --logdir {folder.parent}" if shown else None,
        }
        print("\n" + "\n".join(f"{name + ':':13}{text}" for name, text in lines.items() if text), flush=True)


def _newer(files: list[Path], checkpoint: Path) -> list[Path]:
    """Files that were written after a checkpoint."""
    return [file for file in files if file.stat().st_mtime > checkpoint.stat().st_mtime]


def _kill_ranks(trainer: L.Trainer) -> None:
    """End the processes that Lightning launched for the other ranks."""
    for process in getattr(trainer.strategy.launcher, "procs", []):
        if process.poll() is None:
            process.kill()
