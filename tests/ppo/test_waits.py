"""An optimizer step waits for the device once, where its metrics come over; on a device that is simulated."""

import json
import subprocess
import sys


def test_a_step_waits_once() -> None:
    """Three micro-batches a step. Losses on text add one: their value goes to the callback before PPO's losses."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.simulated_gpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for case, steps in found.items():
        assert len(steps) == 4
        for waits in steps:
            assert [wait.partition(":")[0] for wait in waits] == ["tolist in ranks.py"] * (1 + (case == "text")), waits
