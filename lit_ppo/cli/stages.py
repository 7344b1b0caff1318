"""Stages: runs that come first, each in a process of its own, and skipped while nothing of theirs has changed.

A stage is an ordinary ``lit-ppo fit``. When it succeeds, ``<name>.stage.json`` is written beside its runs: digests of
its effective configuration, of the files that this names for data, model and export, and of the previous stage.
"""

import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse.typing import Path_fr

from lit_ppo.cli.session import Session
from lit_ppo.run.errors import CommandError
from lit_ppo.run.stop import RANK_VARIABLES, end_group

LARGE = 64 * 2**20  # bytes from which on size and time stand for a file's content
PATIENCE = 4.0  # seconds that an interrupted stage gets to end by itself


@dataclass
class Stage:
    """One run that comes first.

    Args:
        name: Short name, for messages and file names.
        config: Configuration files, relative to the file that names them.
        args: Further arguments for ``lit-ppo fit``.
    """

    name: str
    config: list[Path_fr] = field(default_factory=list)
    args: list[str | int | float | bool] = field(default_factory=list)

    def arguments(self, seed: int | bool, data_root: str | None) -> list[str]:
        """Arguments of ``lit-ppo fit`` that run the stage."""
        paths = [Path(str(path)) for path in self.config]
        files = [path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path for path in paths]
        args = [str(arg).lower() if isinstance(arg, bool) else str(arg) for arg in self.args]
        root = [] if data_root is None else ["--data_root", data_root]
        return [*(f"--config={file}" for file in files), *args, "--seed_everything", str(seed).lower(), *root]


def run_stages(session: Session, stages: dict[str, tuple[list[str], dict[str, Any]]]) -> None:
    """Run every stage that is not complete, in order.

    Args:
        session: The command's run; its interrupts end the stages.
        stages: Arguments of ``lit-ppo fit`` and effective configuration of each stage, by name.

    Raises:
        CommandError: A stage would have to run in a launched rank.
        SystemExit: A stage failed, and has printed why.
    """
    previous: dict[str, str] = {}
    for number, (name, (arguments, config)) in enumerate(stages.items(), 1):
        title = f"[stage {number}/{len(stages)}: {name}]"
        record = Path(config["trainer"]["default_root_dir"]) / f"{name}.stage.json"
        reason = outdated(record, config, previous)
        if reason:
            _refuse_in_rank(name, reason)
            session.heartbeat.say(f"{title} {reason}; running: lit-ppo fit {shlex.join(arguments)}", doing=title)
            started = time.monotonic()
            record.unlink(missing_ok=True)
            _run(session, name, arguments)
            record.write_text(json.dumps(digests(config, previous, folders=True), indent=1), encoding="utf-8")
            session.heartbeat.say(f"{title} done in {time.monotonic() - started:.0f} s")
        else:
            session.heartbeat.say(f"{title} already done, skipped ({record})")
        previous = json.loads(record.read_text(encoding="utf-8"))


def _refuse_in_rank(name: str, reason: str) -> None:
    rank = next((f"{variable}={os.environ[variable]}" for variable in RANK_VARIABLES if variable in os.environ), None)
    if rank is not None:
        raise CommandError(
            f"stage {name!r} is not complete ({reason}) and does not run in a launched process ({rank}): run the "
            "command once in one process, with trainer.max_steps 0 if need be, then launch it again"
        )


def _run(session: Session, name: str, arguments: list[str]) -> None:
    """Run one stage in a process group of its own, on the same console."""
    command = [sys.executable, "-m", "lit_ppo", "fit", *arguments, *(["--debug"] if session.debug else [])]
    environment = os.environ | {"LIT_PPO_STAGE": name}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
    session.interrupts.kill_children.append(lambda: end_group(process))
    quiet, session.heartbeat.quiet = session.heartbeat.quiet, math.inf  # the stage has its own heartbeat
    try:
        while process.poll() is None:
            time.sleep(0.05)  # unlike a wait, a signal interrupts it on every system
    finally:
        end_group(process, PATIENCE)
        session.interrupts.kill_children.pop()
        session.heartbeat.quiet = quiet
    if process.returncode < 0:
        raise CommandError(f"stage {name!r} was ended by signal {-process.returncode}")
    if process.returncode > 0:
        print(f"stage {name!r} ended with code {process.returncode}", flush=True)
        raise SystemExit(process.returncode)


def outdated(record: Path, config: dict[str, Any], previous: dict[str, str]) -> str:
    """What has changed since a stage was completed; empty if nothing has."""
    try:
        saved = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "not done yet"
    now = {**{path: _digest(path) for path in saved}, **digests(config, previous)}
    return next((f"{what} has changed" for what in now if now[what] != saved.get(what)), "")


def digests(config: dict[str, Any], previous: dict[str, str], *, folders: bool = False) -> dict[str, str]:
    """What a stage depends on and exports, by name; ``folders`` adds the files of the folders that it names."""
    effective = {key: value for key, value in config.items() if key != "config"}  # their values count
    values = {value for key in ("data", "model", "export") for value in _strings(config.get(key)) if value}
    paths = {str(Path(root, value)) for value in values for root in ("", config.get("data_root") or "")}
    if folders:
        paths |= {str(file) for path in paths if os.path.isdir(path) for file in Path(path).iterdir()}
    return {
        "its configuration or seed": _sha256(json.dumps(effective, sort_keys=True, default=str).encode()),
        "an earlier stage": _sha256(json.dumps(previous).encode()),
        **{path: _digest(path) for path in sorted(paths) if os.path.isfile(path)},
    }


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if key != "data_root":  # shared with other stages: only the files that are named count
                yield from _strings(item)


def _digest(file: str) -> str:
    """Of a file's content, or of size and time if it is large; empty if there is no file."""
    if not os.path.isfile(file):
        return ""
    status = os.stat(file)
    large = f"{status.st_size} {status.st_mtime_ns}".encode() if status.st_size > LARGE else None
    return _sha256(large or Path(file).read_bytes())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
