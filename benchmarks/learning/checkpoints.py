"""Train the models of the film-review task once: ``python -m benchmarks.learning.checkpoints FOLDER --data_root DIR``.

Runs the stages of ``configs/sentiment`` in ``FOLDER``, shorter than these configurations say. Stages whose model is
there are skipped. The critic is trained for responses of ``--max_new_tokens`` tokens.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.learning.task import NEW_TOKENS, ROOT

STAGES = {
    "sft": ["--trainer.max_steps", "1050"],
    "reward": ["--trainer.max_steps", "400"],
    "judge": [],
}
PROMPT, TOKENS = 8, 2048  # tokens of a prompt and of a batch in the critic's stage


def for_critic(max_new_tokens: int) -> list[str]:
    """The sizes of the critic's stage, as arguments: as many tokens a batch for each length."""
    length = PROMPT + max_new_tokens
    sizes = {"model.response_tokens": max_new_tokens, "data.max_length": length, "data.batch_size": TOKENS // length}
    return [word for name, size in sizes.items() for word in (f"--{name}", str(size))]


def check_length(model: Path, max_new_tokens: int) -> None:
    """Refuse a critic that was trained for responses of another length."""
    trained = json.loads((model / "config.json").read_text()).get("response_tokens", max_new_tokens)
    if trained != max_new_tokens:
        raise SystemExit(f"{model}: trained for responses of {trained} tokens; remove it, or give another folder")


def main() -> None:
    """Run the stages that are missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.checkpoints", description=__doc__)
    parser.add_argument("folder", type=Path, help="Where the models go.")
    parser.add_argument("--data_root", type=Path, required=True, help="Folder of the film reviews.")
    parser.add_argument("--max_new_tokens", type=int, default=NEW_TOKENS)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for stage, sizes in (*STAGES.items(), ("critic", for_critic(asked.max_new_tokens))):
        model = asked.folder / "runs" / "sentiment" / stage / "model"
        if model.is_dir():
            check_length(model, asked.max_new_tokens)
            continue
        data = ["--data_root", str(asked.data_root.resolve())]
        command = [sys.executable, "-m", "lit_ppo", "fit", "--config", f"sentiment/{stage}", *data, *sizes]
        subprocess.run(command, cwd=asked.folder, env=environment, check=True)


if __name__ == "__main__":
    main()
