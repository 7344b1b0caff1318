"""What libraries read from the environment when they start: faster defaults on a CPU, where the user sets nothing.

The ``lit-ppo`` command calls both functions. A script of your own may call them before it imports torch.
"""

import ctypes
import os
import sys

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}  # the latter is GNU's, and measured best
MEMORY = {
    "THP_MEM_ALLOC_ENABLE": "1",  # torch's: huge pages, and an alignment by which glibc reuses what was freed
    "MALLOC_MMAP_THRESHOLD_": str(2**28),  # bytes; blocks of up to 256 MiB stay in the process, larger ones do not
    "MALLOC_TRIM_THRESHOLD_": str(2**30),  # bytes, free at the end of the heap, of which more than this is given back
}
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's mallopt


def wait_without_spinning() -> None:
    """Let threads of OpenMP sleep soon while they wait for each other.

    By default they spin for milliseconds, and where another program wants the cores, too, the work of one waits for
    the spinning of the other. OpenMP reads this when torch is imported; processes that this one starts inherit it.
    """
    if not {*WAITING, "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ |= WAITING


def keep_freed_memory() -> None:
    """Keep freed memory for the next tensor, in huge pages where Linux has them.

    By default glibc gives large blocks back to Linux, which has to clear every page of the next one: up to a
    seventh of the time of small models on a CPU.
    """
    if sys.platform != "linux" or any(name in os.environ for name in MEMORY) or "MALLOC_TOP_PAD_" in os.environ:
        return
    os.environ |= MEMORY  # glibc has read its own: these are for processes that this one starts
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, int(MEMORY["MALLOC_MMAP_THRESHOLD_"]))
        mallopt(_TRIM_THRESHOLD, int(MEMORY["MALLOC_TRIM_THRESHOLD_"]))
