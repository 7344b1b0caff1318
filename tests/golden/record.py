"""The golden record: what the jobs computed when it was written.

``python -m tests.golden.record`` runs all jobs and prints what differs; ``--write`` writes the record instead.
"""

import argparse
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers

from tests.golden.jobs import JOBS, run_job
from tests.golden.result import Result

RECORD = Path(__file__).with_name("record.json")
RTOL = 1e-5
ATOL = 2e-6
"""Some metrics, such as the KL, are differences of log-probs of 10 to 30 nats, which float32 rounds to about 1e-6."""


def fingerprint() -> dict[str, str]:
    """What decides on the last bit of a number: the processor, the kernels chosen for it, and the libraries."""
    return {
        "cpu": _cpu(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lightning": lightning.__version__,
    }


def _cpu() -> str:
    """Model of the processor, with the numbers that tell generations apart and its vector instructions."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    lines = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = [flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "fma", "amx"))]
    return " ".join([*(fields.get(name, "") for name in ("model name", "cpu family", "model")), *flags])


def load() -> dict[str, Any]:
    """The record, as it was written."""
    record: dict[str, Any] = json.loads(RECORD.read_text())
    return record


def differences(name: str, recorded: Result, found: Result, *, exact: bool) -> list[str]:
    """One line for each number that differs, with job, update, metric and both numbers.

    Args:
        name: Of the job.
        recorded: What the record has of it.
        found: What it computed now.
        exact: Compare bit for bit; otherwise to ``RTOL``.
    """
    lines = []
    expected, actual = dict(_numbers(recorded)), dict(_numbers(found))
    for where in dict.fromkeys([*expected, *actual]):
        before, now = expected.get(where), actual.get(where)
        if before is None or now is None or not _same(before, now, exact):
            lines.append(f"{name}, {where}: recorded {before!r}, found {now!r}")
    if exact and recorded["sha256"] != found["sha256"]:
        lines.append(f"{name}, SHA-256 of the final weights: recorded {recorded['sha256']}, found {found['sha256']}")
    return lines


def _numbers(of: Result) -> Iterator[tuple[str, float]]:
    for number, update in enumerate(of["updates"], 1):
        yield from ((f"update {number}, {metric}", value) for metric, value in update.items())
    for name, numbers in of["weights"].items():
        yield from ((f"final {name}, {kind}", value) for kind, value in numbers.items())


def _same(before: float, now: float, exact: bool) -> bool:
    if math.isnan(before) or math.isnan(now):
        return math.isnan(before) and math.isnan(now)
    return before == now if exact else math.isclose(before, now, rel_tol=RTOL, abs_tol=ATOL)


def write(found: dict[str, Result]) -> None:
    """Write the record: a line for each update and each weight, so that a change of it can be read."""
    jobs = []
    for name, of in found.items():
        updates = ",\n".join(json.dumps(update) for update in of["updates"])
        weights = ",\n".join(f"{json.dumps(weight)}: {json.dumps(of['weights'][weight])}" for weight in of["weights"])
        jobs.append(
            f'"{name}": {{\n"sha256": "{of["sha256"]}",\n"updates": [\n{updates}\n],\n"weights": {{\n{weights}\n}}\n}}'
        )
    text = f'{{\n"fingerprint": {json.dumps(fingerprint(), indent=1)},\n"jobs": {{\n{",".join(jobs)}\n}}\n}}\n'
    RECORD.write_text(text)


def main() -> int:
    """Run all jobs; 1 if anything differs from the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the record instead of comparing with it")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {}
    for name in JOBS:
        start = time.monotonic()
        found[name] = run_job(name)
        print(f"{name}: {time.monotonic() - start:.1f} s, {found[name]['sha256']}", flush=True)
    if arguments.write:
        write(found)
        return 0
    record = load()
    exact = record["fingerprint"] == fingerprint()
    lines = [line for name in JOBS for line in differences(name, record["jobs"][name], found[name], exact=exact)]
    print(*lines, sep="\n")
    print(f"{len(lines)} differences, compared {'bit for bit' if exact else f'to {RTOL} (another machine)'}")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
