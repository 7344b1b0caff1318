"""``lit-ppo`` as a LightningCLI: what it adds to the parser, and the order in which things are built."""

import math
import os
import warnings
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NoReturn

import lightning as L
import yaml
from jsonargparse import Namespace
from jsonargparse.typing import Path_fr
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from transformers.utils.logging import disable_progress_bar

import lit_ppo.cli.all_names  # noqa: F401  short names in configurations are those of imported classes
from lit_ppo.cli.errors import parsing_error
from lit_ppo.cli.main import LIGHTNING_LOG
from lit_ppo.cli.parser import LayeredParser
from lit_ppo.cli.progress import progress_bar
from lit_ppo.cli.report import RunReport
from lit_ppo.cli.stages import Stage, StageRunner
from lit_ppo.cli.summary import RunSummary
from lit_ppo.parallel.checkpoint_io import read_summary
from lit_ppo.parallel.environment import reserve_port
from lit_ppo.ppo.module import LitPPO
from lit_ppo.run.checkpoint import RUN, StepCheckpoint, find_checkpoints, find_last, steps_logged
from lit_ppo.run.errors import CommandError
from lit_ppo.run.export import ExportModel
from lit_ppo.run.folder import PREFIX, RunTrainer, claim_version
from lit_ppo.run.resume import changes, check_changes, describe_changes
from lit_ppo.supervised.base import SupervisedModule

if TYPE_CHECKING:
    from lit_ppo.cli.main import Session


class Parser(LayeredParser):
    """Takes flags by their full name only, and says what is wrong in one line."""

    arguments: tuple[str, ...] = ()  # of the command line being parsed

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the command, or hand the error to the parser that this one is a part of."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        options = list(parser._option_string_actions)
        for _, subparser in getattr(parser._subcommands_action, "_name_parser_map", {}).items():
            options += subparser._option_string_actions
        raise CommandError(parsing_error(message, sorted(set(options)), Parser.arguments), exit_code=2) from ex


class Command(LightningCLI):
    """The parser, the stages, then model, data and trainer, then the run.

    Args:
        session: The run of the command that this is the heavy part of.
    """

    def __init__(self, session: "Session") -> None:
        self.session = session
        self.heartbeat = session.heartbeat
        self.resumed: Path | None = None
        self.steps_logged = 0  # for good, by the time of that checkpoint
        self.goes_on = False  # with logging in the checkpoint's own folder
        Parser.arguments = tuple(session.arguments)
        super().__init__(
            model_class=L.LightningModule,
            trainer_class=RunTrainer,
            subclass_mode_model=True,
            save_config_kwargs={"overwrite": True},  # a continued run writes into the same folder
            trainer_defaults={"default_root_dir": "runs", "log_every_n_steps": 1},
            seed_everything_default=42,
            parser_class=Parser,
            args=session.arguments,
            auto_configure_optimizers=False,
        )

    @property
    def _config(self) -> Namespace:
        config: Namespace = self.config[self.subcommand]
        return config

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What ``lit-ppo`` adds to every LightningCLI."""
        parser.add_argument(
            "--stages", type=list[Stage] | None, default=None, help="Runs that fit does first, each in its own process."
        )
        parser.add_argument(
            "--data_root", type=str | None, default=None, help="Folder that relative paths of the data start from."
        )
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExportModel, "export")
        parser.add_lightning_class_args(RunReport, "report")
        parser.description = f"{parser.description or ''} Add --debug for tracebacks of errors.".strip()

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser of all subcommands but ``export``, which it mentions."""
        kwargs["epilog"] = "One more: 'lit-ppo export --help' writes the model of a checkpoint, for from_pretrained."
        return super().init_parser(**kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, hand ``data_root`` to the data, and make paths independent of the folder they were named in."""
        self.heartbeat.begin("reading the configuration")
        self.config = parser.parse_args(args)
        config = self.config[self.config.subcommand]
        _check_groups(config)
        _use_fsdp2(config)
        if not _hand_over_data_root(config) and not config.stages and "LIT_PPO_STAGE" not in os.environ:
            raise CommandError(
                f"--data_root {config.data_root}: neither the data module nor a stage takes it; leave it out",
                exit_code=2,
            )
        for stage in config.stages or []:
            stage.config = [Path_fr(path.absolute) for path in stage.config]

    def _parse_ckpt_path(self) -> None:
        """Find ``last`` and ``auto``. What the command line says rules over the checkpoint's hyperparameters."""
        config = self.config[self.config.subcommand]
        given = config.get("ckpt_path")
        if given in ("last", "auto"):
            try:
                self.resumed = find_last(Path(config.trainer.default_root_dir), config.checkpoint.dirpath)
            except CommandError:
                if given == "last":
                    raise
            config.ckpt_path = None if self.resumed is None else str(self.resumed)
        elif given and not Path(given).exists() and "://" not in given:
            raise CommandError(f"--ckpt_path {given}: no such file; give a checkpoint's path, or 'last'")
        if config.ckpt_path and self.config.subcommand == "fit" and "://" not in config.ckpt_path:
            self._compare(Path(config.ckpt_path))

    def _compare(self, checkpoint: Path) -> None:
        """Say what has changed since the checkpoint was written, and refuse what cannot."""
        summary = read_summary(checkpoint)
        run = summary.get(RUN) or {}
        self.steps_logged = steps_logged(summary)
        if run.get("config") is None:
            return
        changed = changes(run["config"], self._effective(self.config["fit"]))
        check_changes(str(checkpoint), changed)
        if changed:
            lines = [f"Continuing {checkpoint} with another configuration:", *describe_changes(changed)]
            if any(name.startswith(("model.init_args.", "optimizer.", "lr_scheduler.")) for name in changed):
                lines += self._keeps_rates()
            self.heartbeat.say("\n  ".join(lines), doing="reading the configuration")

    def _keeps_rates(self) -> list[str]:
        """What a changed learning rate comes to in a module that is not ours."""
        name = self.config["fit"].model.class_path
        if issubclass(resolve_name(name), LitPPO | SupervisedModule):
            return []
        return [f"{name}: Lightning goes on with its optimizers and schedules as they were saved, whatever is changed"]

    def _effective(self, config: Namespace) -> dict[str, Any]:
        """The whole configuration as plain values."""
        dumped = self._parser("fit").dump(config, skip_link_targets=False, skip_unset=False, format="yaml")
        return dict(yaml.safe_load(dumped))

    def parse_stage(self, arguments: list[str]) -> dict[str, Any]:
        """Effective configuration of ``lit-ppo fit`` with other arguments."""
        given, Parser.arguments = Parser.arguments, tuple(arguments)
        try:
            config = self._parser("fit").parse_args(arguments)
            _check_groups(config)
            _hand_over_data_root(config)
            return self._effective(config)
        finally:
            Parser.arguments = given

    def before_instantiate_classes(self) -> None:
        """Run the stages: models and data of this run may be what they write."""
        config = self._config
        if self.subcommand == "fit" and config.stages:
            session = self.session
            runner = StageRunner(
                [Stage(**vars(stage)) for stage in config.stages],
                self.parse_stage,
                session.heartbeat,
                session.interrupts,
                debug=session.debug,
            )
            runner.run(config.seed_everything, config.data_root)
        self.heartbeat.say(f"{self.subcommand}: building model, data and trainer")
        if config.trainer.enable_progress_bar is False:
            self.heartbeat.quiet = math.inf
            disable_progress_bar()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer, with the logger and the progress bar that this command is about."""
        config = self._get(self.config_init, "trainer")
        if (config.logger is None or config.logger is True) and not config.fast_dev_run:
            kwargs["logger"] = self._logger(Path(config.default_root_dir))
        trainer: Any = super().instantiate_trainer(**kwargs)
        reserve_port(trainer.strategy)
        if trainer.needs_folder and not trainer.fast_dev_run:
            trainer.run_folder = self._run_folder(Path(config.default_root_dir))
        self.session.interrupts.kill_children.append(lambda: _kill_ranks(trainer))
        return trainer  # type: ignore[no-any-return]

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

    def _continued(self) -> Path | None:
        """The run folder that a run continued with ``last`` goes on in."""
        folder = self.resumed.parent.parent if self.subcommand == "fit" and self.resumed is not None else None
        return folder if folder is not None and folder.name.startswith(PREFIX) else None

    def _logger(self, root: Path) -> TensorBoardLogger:
        """TensorBoard under ``<root>/version_N``."""
        folder = self._continued()
        if folder is None:
            # from step 0 on: TensorBoard takes the first start in a folder for that of the run, and drops nothing by it
            return TensorBoardLogger(root, name="", version=claim_version(root), default_hp_metric=False, purge_step=0)
        version = int(folder.name.removeprefix(PREFIX))
        self.goes_on = True
        # What was logged after the checkpoint is logged again: readers drop the first telling.
        return TensorBoardLogger(root, name="", version=version, default_hp_metric=False, purge_step=self.steps_logged)

    def _run_folder(self, root: Path) -> str | None:
        """The same for loggers of other kinds."""
        folder = self._continued()
        if folder is not None:
            return str(folder)
        version = claim_version(root)
        return None if version is None else str(root / f"{PREFIX}{version}")

    def before_fit(self) -> None:
        """Let checkpoints hold the configuration, and an interrupt know where and when this run saves."""
        checkpoint = self._get(self.config_init, "checkpoint")
        checkpoint.config, checkpoint.log_again = self._effective(self._config), self.goes_on
        self.session.interrupts.will_stop = lambda: checkpoint.stop_request.listening
        # Lightning takes the last epoch for done, also where a callback has ended it
        LIGHTNING_LOG.addFilter(
            lambda record: not (self.trainer.should_stop and "stopped: `max_epochs=" in record.getMessage())
        )
        # told above, as old -> new
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks used to create")
        if self.trainer.is_global_zero and checkpoint in self.trainer.callbacks:  # type: ignore[attr-defined]
            folder = checkpoint.dirpath or Path(self.trainer.log_dir or self.trainer.default_root_dir) / "checkpoints"
            self.session.checkpoints = Path(folder)

    def after_fit(self) -> None:
        """Say where everything lies."""
        trainer = self.trainer
        log_dir = trainer.log_dir
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(log_dir or trainer.default_root_dir)
        checkpoint, export = (self._get(self.config_init, key) for key in ("checkpoint", "export"))
        shown = not trainer.loggers or any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        saved = [path.name for path in find_checkpoints(Path(checkpoint.dirpath or folder))]
        lines = {
            "Run folder": str(folder),
            "Model": f"{export.written}  (load it with from_pretrained)" if export.written else None,
            "Checkpoints": f"{checkpoint.dirpath}  ({', '.join(saved)})" if saved else None,
            "TensorBoard": f"tensorboard --logdir {folder.parent if trainer.logger else folder}" if shown else None,
        }
        print("\n" + "\n".join(f"{name + ':':13}{text}" for name, text in lines.items() if text), flush=True)


def _check_groups(config: Namespace) -> None:
    """Refuse a value where keys belong, which the parser lets pass."""
    for group in ("trainer", "checkpoint", "export", "report"):
        if not isinstance(config.get(group), Namespace):
            raise CommandError(f"{group}: {config.get(group)!r} is not a mapping; give its keys below it", exit_code=2)


def _use_fsdp2(config: Namespace) -> None:
    """Replace Lightning's name for the first version of FSDP, and refuse its class."""
    strategy = config.trainer.get("strategy")
    if strategy == "fsdp":
        config.trainer.strategy = "fsdp2"
    elif isinstance(strategy, Namespace) and strategy.class_path.endswith(".FSDPStrategy"):
        raise CommandError(
            "--trainer.strategy FSDPStrategy: the first version of FSDP is not supported; use fsdp2", exit_code=2
        )


def _hand_over_data_root(config: Namespace) -> bool:
    """Set ``data_root`` of the data, and of data that callbacks bring, where it is given; False if nobody has one."""
    if config.data_root is None:
        return True
    callbacks = config.trainer.get("callbacks") or []
    brought = [
        (callback.get("init_args") or {}).get("data")
        for callback in (callbacks if isinstance(callbacks, list) else [callbacks])
    ]
    takers = [
        data.init_args
        for data in (config.get("data"), *brought)
        if isinstance(data, Namespace) and "data_root" in data.get("init_args", {})
    ]
    for taker in takers:
        taker.data_root = config.data_root
    return bool(takers)


def _kill_ranks(trainer: L.Trainer) -> None:
    """End the processes that Lightning launched for the other ranks."""
    for process in getattr(trainer.strategy.launcher, "procs", []):
        if process.poll() is None:
            process.kill()
