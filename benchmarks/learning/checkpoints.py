"""Train the models of the film-review task once: ``python -m benchmarks.learning.checkpoints FOLDER --data_root DIR``.

Runs the stages of ``configs/sentiment`` in ``FOLDER``, shorter than these configurations say. Stages whose model is
there are skipped.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.learning.task import ROOT

STAGES = {
    "sft": ["--trainer.max_steps", "1050"],
    "reward": ["--trainer.max_steps", "400"],
    "judge": [],
    "critic": [],
}


def main() -> None:
    """Run the stages that are missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.checkpoints", description=__doc__)
    parser.add_argument("folder", type=Path, help="Where the models go.")
    parser.add_argument("--data_root", type=Path, required=True, help="Folder of the film reviews.")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for stage, sizes in STAGES.items():
        if (asked.folder / "runs" / "sentiment" / stage / "model").is_dir():
            continue
        data = ["--data_root", str(asked.data_root.resolve())]
        command = [sys.executable, "-m", "lit_ppo", "fit", "--config", f"sentiment/{stage}", *data, *sizes]
        subprocess.run(command, cwd=asked.folder, env=environment, check=True)


if __name__ == "__main__":
    main()
