"""Measure seconds per phase, memory, and floating-point operations relative to the machine's matrix products."""

import resource
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

PHASES = ("rollout", "scoring", "forward", "backward", "optimizer", "other")


def update_flops(hidden: int, layers: int, vocabulary: int, lengths: list[tuple[int, int]], epochs: int) -> int:
    """Floating-point operations that the optimizer steps of one update need, actor and critic.

    Only real tokens count, and recomputation does not. A multiply-add counts as two, a backward as two forwards. The
    vocabulary head counts at response tokens only; attention counts pairs with earlier tokens and the token itself.

    Args:
        hidden: Width.
        layers: Blocks.
        vocabulary: Tokens.
        lengths: Prompt and response tokens of each row.
        epochs: Passes over the rows.
    """
    forward = 0
    for prompt, response in lengths:
        tokens = prompt + response
        linear = 24 * hidden * hidden * tokens  # qkv 3, output 1, feed-forward 8 times hidden^2, two each
        attention = 4 * hidden * tokens * (tokens + 1) // 2  # scores and their products with the values
        heads = 2 * hidden * (vocabulary + 1) * response
        forward += 2 * layers * (linear + attention) + heads
    return 3 * epochs * forward


def matmul_peak(size: int = 4096, dtype: str = "float32", repeats: int = 3, device: str = "cpu") -> float:
    """Operations per second of the fastest of several square matrix products."""
    import torch

    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(repeats):
        start = perf_counter()
        a @ a
        synchronize()
        best = min(best, perf_counter() - start)
    return 2 * size**3 / best


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock:
    """Seconds per phase. The time after a switch counts for the phase that was switched to."""

    def __init__(self) -> None:
        self.phase, self.since = "other", perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.laps: list[dict[str, float]] = []

    def switch(self, phase: str) -> None:
        """Leave one phase for another."""
        synchronize()
        now = perf_counter()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    def lap(self) -> None:
        """End an update."""
        self.switch("other")
        self.laps.append(self.seconds)
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def around(
        self, owner: Any, name: str, during: str, after: str = "other", when: Callable[[], bool] = lambda: True
    ) -> None:
        """Wrap a function of a module or an object, so that it switches the phase when it starts and when it ends.

        Args:
            owner: What it is an attribute of.
            name: The attribute.
            during: Phase while it runs.
            after: Phase from its end.
            when: Called each time; if it returns False, nothing is switched.
        """
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not when():
                return function(*args, **kwargs)
            self.switch(during)
            result = function(*args, **kwargs)
            self.switch(after)
            return result

        setattr(owner, name, wrapped)


def touch(model: Any) -> None:
    """Read all weights, so that those mapped from a file are in memory before memory is measured."""
    for parameter in model.parameters():
        parameter.detach().sum()


def memory() -> tuple[int, int]:
    """Bytes in use now and at the peak, of the accelerator if there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    # ru_maxrss only as a fallback: a process inherits it from the larger one that started it
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    now, most = (int(lines.get(name, str(most)).split()[0]) for name in ("VmRSS", "VmHWM"))
    return now * 1024, most * 1024
