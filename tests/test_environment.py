"""What the command sets before libraries start, and that a user's own settings stay."""

import os
import subprocess
import sys

import pytest

from lit_ppo.environment import MEMORY, WAITING, keep_freed_memory, wait_without_spinning
from tests.helpers.command import REPOSITORY

NAMES = (*WAITING, *MEMORY, "KMP_BLOCKTIME", "MALLOC_TOP_PAD_")
TENSORS = """
import resource, statistics, sys
from lit_ppo.environment import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import torch

def work():
    for _ in range(4):
        torch.ones(10 * 2**20)  # 40 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

print(statistics.median_low(-work() + work() for _ in range(7)))
"""


COMMAND = """
import os, sys
from lit_ppo.cli.main import main
main(None if len(sys.argv) > 1 else ["--version"])
print("MALLOC_MMAP_THRESHOLD_" in os.environ)
"""


@pytest.fixture
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Only these settings of the user."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)
    return dict(request.param)


def _set() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


@pytest.mark.parametrize(
    "environment",
    [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5"}, {"KMP_BLOCKTIME": "9"}],
    indirect=True,
)
def test_threads_wait_without_spinning_unless_the_user_says_how(environment: dict[str, str]) -> None:
    wait_without_spinning()
    assert _set() == (environment or {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"})


@pytest.mark.parametrize(
    "environment",
    [{"THP_MEM_ALLOC_ENABLE": "0"}, {"MALLOC_TRIM_THRESHOLD_": "1"}, {"MALLOC_TOP_PAD_": "1"}],
    indirect=True,
)
def test_memory_is_as_the_user_says(environment: dict[str, str]) -> None:
    keep_freed_memory()
    assert _set() == environment


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is asked to keep memory")
def test_freed_memory_serves_the_next_tensors() -> None:
    """Stock glibc keeps no block of over 32 MiB: Linux clears 10,240 pages in each of four rounds.

    Kept, it clears none, but for the 512 small ones of a huge page that it takes apart now and then.
    """
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    faults = {}
    for memory in ("stock", "kept"):
        command = [sys.executable, "-c", TENSORS, memory]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
        faults[memory] = int(done.stdout)
    if faults["stock"] < 4 * 10_240:
        pytest.skip("another allocator, or pages of another size")
    assert faults["kept"] < 100


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is asked to keep memory")
@pytest.mark.parametrize(("arguments", "kept"), [(["--version"], "True"), ([], "False")])
def test_the_command_keeps_memory_of_its_own_process_alone(arguments: list[str], kept: str) -> None:
    """``main([...])`` runs in somebody else's process."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", COMMAND, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == kept
