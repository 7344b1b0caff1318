"""Runs that must come first, each in a process of its own, and skipped once they are done.

A stage is an ordinary ``lit-ppo fit``. When it has succeeded a marker is written beside its runs; it holds a digest of
the stage's effective configuration (arguments, seed and data root included), of the data files that this names, of the
files it exported, and of the markers of the stages before it. The stage is skipped only while all of that still holds.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse.typing import Path_fr

from lit_ppo.cli.heartbeat import Heartbeat
from lit_ppo.run.errors import CommandError
from lit_ppo.run.stop import RANK_VARIABLES, Interrupts, end_group

WHOLE = 64 * 2**20  # bytes up to which a file is read whole; above, size and time stand for it
PATIENCE = 4.0  # seconds an interrupted stage gets to end by itself


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

    def command(self, seed: int | bool, data_root: str | None) -> list[str]:
        """Arguments of ``lit-ppo`` that run the stage."""
        files = [word for path in self.config for word in ("--config", _short(str(path)))]
        given = [str(arg).lower() if isinstance(arg, bool) else str(arg) for arg in self.args]
        root = [] if data_root is None else ["--data_root", data_root]
        return ["fit", *files, *given, "--seed_everything", str(seed).lower(), *root]


def _short(path: str) -> str:
    """The path from the working directory, where that is below it."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


class StageRunner:
    """Runs the stages that are not done yet, in order.

    Args:
        stages: What to run.
        parse: Gives the effective configuration of a command's arguments, as plain dictionaries.
        heartbeat: Told what is going on.
        interrupts: Told which processes to end.
        debug: Passed on to the stages.
    """

    def __init__(
        self,
        stages: list[Stage],
        parse: Callable[[list[str]], dict[str, Any]],
        heartbeat: Heartbeat,
        interrupts: Interrupts,
        *,
        debug: bool = False,
    ) -> None:
        self.stages = stages
        self.parse = parse
        self.heartbeat = heartbeat
        self.interrupts = interrupts
        self.debug = debug
        names = [stage.name for stage in stages]
        for name in names:
            if not re.fullmatch(r"[\w.-]+", name) or names.count(name) > 1:
                raise CommandError(f"stages: name {name!r} must be unique and made of letters, digits, '_', '-', '.'")

    def run(self, seed: int | bool, data_root: str | None) -> None:
        """Run every stage that is not complete.

        Raises:
            CommandError: One of them failed, or would have to run in a launched rank.
        """
        commands = [stage.command(seed, data_root) for stage in self.stages]
        configs = [self._parse(stage, command) for stage, command in zip(self.stages, commands, strict=True)]
        earlier: list[str] = []
        for number, (stage, command, config) in enumerate(zip(self.stages, commands, configs, strict=True), 1):
            title = f"[stage {number}/{len(self.stages)}: {stage.name}]"
            marker = Marker(stage.name, config, data_root, earlier)
            reason = marker.missing()
            if not reason:
                self.heartbeat.say(f"{title} already done, skipped ({marker.path})")
            else:
                self._refuse_rank(stage, reason)
                started = time.monotonic()
                self.heartbeat.say(f"{title} {reason}; running: lit-ppo {shlex.join(command)}", doing=title)
                self._run_one(stage, command, marker)
                marker.write()
                self.heartbeat.say(f"{title} done in {time.monotonic() - started:.0f} s")
            earlier = [*earlier, marker.digest()]

    def _parse(self, stage: Stage, command: list[str]) -> dict[str, Any]:
        try:
            config = self.parse(command[1:])
        except CommandError as error:
            raise CommandError(f"stage {stage.name!r}: {error}", error.exit_code) from error
        if config.get("stages"):
            raise CommandError(f"stage {stage.name!r}: its configuration has stages of its own; name them one by one")
        return config

    @staticmethod
    def _refuse_rank(stage: Stage, reason: str) -> None:
        rank = next((f"{name}={os.environ[name]}" for name in RANK_VARIABLES if name in os.environ), None)
        if rank is not None:
            raise CommandError(
                f"stage {stage.name!r} is not complete ({reason}) and is not run in a launched process ({rank}): "
                "run the command once in one process, with trainer.max_steps 0 if need be, then launch it again"
            )

    def _run_one(self, stage: Stage, command: list[str], marker: "Marker") -> None:
        marker.path.unlink(missing_ok=True)
        marker.path.parent.mkdir(parents=True, exist_ok=True)
        log_path = marker.path.with_name(f"{stage.name}.stage.log")
        full = [sys.executable, "-m", "lit_ppo", *command, *(["--debug"] if self.debug else [])]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "LIT_PPO_STAGE": stage.name}
        process = subprocess.Popen(
            full,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self.interrupts.kill_children.append(lambda: end_group(process))
        quiet, self.heartbeat.quiet = self.heartbeat.quiet, 1.5 * self.heartbeat.quiet  # the stage has its own
        with log_path.open("w", encoding="utf-8") as log:
            copies = [Copy(process.stdout, [sys.stdout, log], self.heartbeat.touch)]
            copies.append(Copy(process.stderr, [sys.stderr, log], self.heartbeat.touch))
            try:
                while process.poll() is None:
                    time.sleep(0.05)  # in slices, so that a signal is seen at once
            finally:
                end_group(process, PATIENCE)
                self.interrupts.kill_children.pop()
                self.heartbeat.quiet = quiet
                for copy in copies:
                    copy.join(timeout=5.0)
        if process.returncode != 0:
            print(f"stage {stage.name!r} ended with code {process.returncode}; its output: {log_path}", flush=True)
            last_line = copies[1].last_line.removeprefix("lit-ppo: error: ")
            raise CommandError(last_line or f"stage {stage.name!r}: no message; see {log_path}")


class Copy(threading.Thread):
    """Passes lines on as they come, and remembers the last one that says something."""

    def __init__(self, source: Any, targets: list[Any], on_line: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.source = source
        self.targets = targets
        self.on_line = on_line
        self.last_line = ""
        self.start()

    def run(self) -> None:
        """Until the source ends."""
        for line in self.source:
            self.on_line()
            self.last_line = line.strip() or self.last_line
            for target in self.targets:
                target.write(line)
                target.flush()
        self.source.close()


class Marker:
    """What a finished stage leaves behind, and what is compared with it.

    Args:
        name: Of the stage.
        config: Its effective configuration.
        data_root: Folder that relative data paths start from.
        earlier: Digests of the markers of the stages before it.
    """

    def __init__(self, name: str, config: dict[str, Any], data_root: str | None, earlier: list[str]) -> None:
        self.config = {key: value for key, value in config.items() if key != "config"}
        self.data_root = data_root
        self.earlier = list(earlier)
        root = Path(config["trainer"]["default_root_dir"])
        self.path = root / f"{name}.stage.json"
        exported = (config.get("export") or {}).get("dirpath")
        self.outputs = Path(exported) if exported else None

    def missing(self) -> str:
        """Why the stage has to run; empty if it need not."""
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return "not done yet"
        except (OSError, ValueError):
            return f"{self.path} cannot be read"
        if saved["config"] != _digest(self.config):
            return "its configuration or seed has changed"
        if saved["earlier"] != self.earlier:
            return "an earlier stage has run again"
        for path, fingerprint in {**saved["data"], **saved["outputs"]}.items():
            if not Path(path).is_file():
                return f"{path} is gone"
            if fingerprint_of(Path(path)) != fingerprint:
                return f"{path} has changed"
        if set(saved["data"]) != {str(path) for path in self._data_files(saved["data"])}:
            return "its data files have changed"
        return ""

    def write(self) -> None:
        """Record that the stage is complete; atomically."""
        outputs = [p for p in sorted(self.outputs.rglob("*")) if p.is_file()] if self.outputs else []
        content = {
            "config": _digest(self.config),
            "earlier": self.earlier,
            "data": {str(path): fingerprint_of(path) for path in self._data_files(None)},
            "outputs": {str(path): fingerprint_of(path) for path in outputs},
            "finished": time.time_ns(),  # a stage that ran again makes the later ones run again
        }
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.replace(self.path)

    def digest(self) -> str:
        """Stands for this completed stage in the markers of the later ones."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def _data_files(self, recorded: Any) -> list[Path]:
        """Files that the configuration of data and model names.

        In a folder only those that were there when the stage ended count: a later stage may write beside them.
        """
        found: set[Path] = set()
        for value in _strings({key: self.config.get(key) for key in ("data", "model")}):
            for path in {Path(value), Path(self.data_root or ".") / value}:
                try:
                    inside = [path] if path.is_file() else list(path.iterdir()) if value and path.is_dir() else []
                except OSError:  # not a path at all: too long, or with odd characters
                    continue
                found |= {p for p in inside if p.is_file() and (p == path or recorded is None or str(p) in recorded)}
        return sorted(found)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "data_root":  # a folder of everybody's data: only files that are named count
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_of(path: Path) -> str:
    """Of a file's content; of its size and time where it is large."""
    status = path.stat()
    if status.st_size > WHOLE:
        return f"{status.st_size} bytes, {status.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()
