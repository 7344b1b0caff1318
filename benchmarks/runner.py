"""Start workers, each in its own process, and read what they print."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.jobs import Job
from lit_ppo.environment import MEMORY

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}


@dataclass(frozen=True)
class Runner:
    """How workers run.

    Args:
        threads: Of each worker.
        precision: ``"32-true"`` or ``"bf16-mixed"``.
        trl_python: Interpreter of an environment with TRL; None: only LitPPO runs.
        warmup: Updates before those measured.
        updates: Updates measured.
        timeout: Seconds that a worker may take.
    """

    threads: int = 1
    precision: str = "32-true"
    trl_python: str | None = None
    warmup: int = 1
    updates: int = 1
    timeout: int = 3600

    def run(self, side: str, folder: Path, settings: dict[str, Any], capture: Path | None = None) -> dict[str, Any]:
        """Run one side on a job's files.

        Args:
            side: ``"ours"`` or ``"trl"``.
            folder: From :func:`job_files`.
            settings: Override the side's defaults; ``environment`` is set for the process.
            capture: Where to save the first update's numbers; nothing is timed then.

        Returns:
            What the worker printed.
        """
        settings = {"environment": MEMORY if side == "ours" else {}} | settings  # ours: as the command has it
        spec = {
            "folder": str(folder),
            "settings": settings,
            "threads": self.threads,
            "precision": self.precision,
            "warmup": 0 if capture else self.warmup,
            "updates": 1 if capture else self.updates,
            "capture": str(capture) if capture else None,
        }
        python, module = (sys.executable, "ours") if side == "ours" else (str(self.trl_python), "trl_side")
        return json.loads(self._call(python, module, spec, settings["environment"]).splitlines()[-1])

    @contextmanager
    def job_files(self, job: Job) -> Iterator[Path]:
        """A folder with the files that both sides load; it exists inside the context."""
        with tempfile.TemporaryDirectory() as folder:
            self._call(sys.executable, "files", {"job": asdict(job), "folder": folder}, {})
            yield Path(folder)

    def _call(self, python: str, module: str, spec: dict[str, Any], environment: dict[str, str]) -> str:
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        done = subprocess.run(
            [python, "-m", f"benchmarks.{module}", json.dumps(spec)],
            cwd=ROOT,
            env=os.environ | QUIET | threads | environment,
            capture_output=True,
            text=True,
            timeout=self.timeout,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"benchmarks.{module} failed on {json.dumps(spec)}:\n{done.stderr[-3000:]}")
        return done.stdout
