"""Stages: runs that come first, each in a process of its own, and skipped while nothing of theirs has changed.

A stage is an ordinary ``lit-ppo fit``. When it succeeds, it leaves ``<name>.stage.json`` beside its runs: digests of
its configuration, of the files that this names for data, model and export, and of the previous stage.
"""

import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse.typing import register_type

from lit_ppo.cli import shipped
from lit_ppo.cli.session import Session
from lit_ppo.models.stored import sampled_digest
from lit_ppo.parallel.files import WEIGHTS, atomic_path
from lit_ppo.run.errors import CommandError
from lit_ppo.run.stop import RANK_VARIABLES

CONFIGURATION, EARLIER = "its configuration or seed", "an earlier stage"  # in every record
LARGE = 64 * 2**20  # bytes; of larger files size and time stand for the content, and a part of it for weights


class ConfigFile(str):
    """The absolute path of a configuration file, from a path or a name of one that comes with the package."""

    def __new__(cls, text: str) -> "ConfigFile":
        file = shipped.find(text)
        if not shipped.is_file(file):
            raise ValueError(f"{text}: file does not exist, nor is it a name; {shipped.nearest(text)}")
        return super().__new__(cls, os.path.abspath(file))  # the parser is in the folder of the file that it reads

    @property
    def shown(self) -> str:
        """Its name, or its path relative to the working directory if it lies below it."""
        here = Path(self).relative_to(Path.cwd()) if Path(self).is_relative_to(Path.cwd()) else self
        return shipped.name_of(self) or str(here)

    @property
    def saved(self) -> str:
        """Its name, which another machine knows, too, or its path."""
        return shipped.name_of(self) or str(self)


register_type(ConfigFile, lambda file: file.saved, ConfigFile)


@dataclass
class Stage:
    """One run that comes first.

    Args:
        name: Short name, for messages and file names.
        config: Configuration files, relative to the file that names them, or names that ``lit-ppo ls`` lists.
        args: Further arguments for ``lit-ppo fit``.
    """

    name: str
    config: list[ConfigFile] = field(default_factory=list)
    args: list[str | int | float | bool] = field(default_factory=list)

    def arguments(self, seed: int | bool, data_root: str | None) -> list[str]:
        """Arguments of ``lit-ppo fit`` that run the stage."""
        args = [str(arg).lower() if isinstance(arg, bool) else str(arg) for arg in self.args]
        root = [] if data_root is None else ["--data_root", data_root]
        files = [f"--config={ConfigFile(file).shown}" for file in self.config]
        return [*files, *args, "--seed_everything", str(seed).lower(), *root]


Stages = dict[str, tuple[list[str], dict[str, Any]]]
"""The arguments and the full configuration of each stage, by name."""


def check_stages_stay(ckpt_path: str, stages: Stages) -> None:
    """Check before a run is resumed that no stage would replace its model, from which the run started.

    Raises:
        CommandError: One would run again; says why.
    """
    previous = ""
    for name, (_, config) in stages.items():
        record, model = _record(name, config), config["export"]["dirpath"]
        reason = outdated(record, config, previous)
        if reason and (record.exists() or (model is not None and Path(model).exists())):
            raise CommandError(
                f"--ckpt_path {ckpt_path}: stage {name!r} would run again ({reason}) and replace its model, from which "
                "this run started; restore what has changed, or start a new run without --ckpt_path"
            )
        previous = _digest(record)


def run_stages(session: Session, stages: Stages) -> None:
    """Run every stage that is not complete, in order."""
    previous = ""
    for number, (name, (arguments, config)) in enumerate(stages.items(), 1):
        title = f"[stage {number}/{len(stages)}: {name}]"
        record = _record(name, config)
        rank = next((f"{key}={os.environ[key]}" for key in RANK_VARIABLES if key in os.environ), None)
        _check_record(name, record)
        reason = outdated(record, config, previous)
        if not reason:
            session.heartbeat.say(f"{title} already done, skipped ({record})")
        elif rank:
            raise CommandError(
                f"stage {name!r} is not complete ({reason}) and does not run in a launched process ({rank}): run the "
                "command once in one process, with trainer.max_steps 0 if need be, then launch it again"
            )
        else:
            session.heartbeat.say(f"{title} {reason}; running: lit-ppo fit {shlex.join(arguments)}", doing=title)
            started = time.monotonic()
            record.unlink(missing_ok=True)
            _run(session, name, arguments)
            done = json.dumps(digests(config, previous, files_of(config)), indent=1)
            with atomic_path(record) as path:
                path.write_text(done, encoding="utf-8")
            session.heartbeat.say(f"{title} done in {time.monotonic() - started:.0f} s")
        previous = _digest(record)


def _record(name: str, config: dict[str, Any]) -> Path:
    return Path(config["trainer"]["default_root_dir"]) / f"{name}.stage.json"


def _run(session: Session, name: str, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "lit_ppo", "fit", *arguments, *(["--debug"] if session.debug else [])]
    session.heartbeat.tick = lambda: None  # the stage has its own heartbeat
    code = session.interrupts.run_child(command, os.environ | {"LIT_PPO_STAGE": name})
    if code < 0:
        raise CommandError(f"stage {name!r} was ended by signal {-code}")
    if code > 0:
        print(f"stage {name!r} ended with code {code}", flush=True)
        raise SystemExit(code)


def _check_record(name: str, record: Path) -> None:
    """Refuse to replace a file that is no record of a stage."""
    try:
        is_record = {CONFIGURATION, EARLIER} <= json.loads(record.read_text(encoding="utf-8")).keys()
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError, RecursionError):
        is_record = False
    if not is_record and (not record.is_file() or record.stat().st_size):
        raise CommandError(
            f"stage {name!r}: {record} is in the way, and lit-ppo did not write it; move it away, or rename the stage"
        )


def outdated(record: Path, config: dict[str, Any], previous: str) -> str:
    """What has changed since a stage was completed; empty if nothing has."""
    try:
        saved = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "not done yet"
    now = digests(config, previous, saved)
    return next((f"{what} has changed" for what in now if now[what] != saved.get(what)), "")


def digests(config: dict[str, Any], previous: str, files: Iterable[str | Path]) -> dict[str, str]:
    """What a stage depends on and exports, by name; ``previous`` is the digest of the earlier stage's record."""
    settings = {key: value for key, value in config.items() if key not in ("config", "verify")}  # of no effect
    return {
        **{str(file): _digest(file) for file in files},
        CONFIGURATION: json.dumps(settings, sort_keys=True, default=str),
        EARLIER: previous,
    }


def files_of(config: dict[str, Any]) -> list[Path]:
    """Files that a stage's configuration names, and those in the folders that it names."""
    named = {path for key in ("data", "model", "export") for path in _paths(config.get(key))}
    found = (file for path in named for file in (path.iterdir() if path.is_dir() else [path]))
    return sorted(file for file in found if file.is_file())


def _paths(value: Any, data_root: str = "") -> Iterator[Path]:
    """Paths that the strings may name: files of data lie under the ``data_root`` beside them, models do not."""
    if isinstance(value, str) and value:
        yield from [Path(data_root, value)] if not os.path.isdir(value) else [Path(data_root, value), Path(value)]
    elif isinstance(value, dict):
        root = value.get("data_root") or data_root
        yield from (path for key, item in value.items() if key != "data_root" for path in _paths(item, root))
    elif isinstance(value, list):
        yield from (path for item in value for path in _paths(item, data_root))


def _digest(file: str | Path) -> str:
    """Of a file's content, or of size and time (weights: of size and a part) if large; empty if there is no file."""
    if not os.path.isfile(file):
        return ""
    if os.path.getsize(file) > LARGE and str(file).endswith(WEIGHTS):
        return sampled_digest(Path(file))
    if os.path.getsize(file) > LARGE:
        return f"{os.path.getsize(file)} {os.stat(file).st_mtime_ns}"
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
